"""Loads models in the background: the page opens at once, and the first question waits for the models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from threading import Thread
from typing import TYPE_CHECKING, Any

from ..conversation import Engine, Transcript
from ..fetching import megabytes_fetched

if TYPE_CHECKING:
    import numpy as np

    from ..models.text_to_speech import SpokenSentence

PATIENCE = "The models are still being loaded. Your answer comes as soon as they are."


class LoadingEngine:
    """Stands in for an engine while it loads, and forwards every call to it.

    Args:
        load: returns the engine; runs in its own thread, or in the caller's with ``load_here``.
        notify: called with a sentence when a request has to wait for the engine.
    """

    def __init__(self, load: Callable[[], Engine], notify: Callable[[str], None]):
        self._load, self._notify = load, notify
        self._loaded: Future = Future()

    def start(self) -> None:
        """Starts loading."""
        Thread(target=self._run, daemon=True).start()

    def load_here(self) -> None:
        """Loads in this thread; ZeroGPU emulates CUDA in the thread that imported ``spaces`` alone.

        Raises:
            MmchatError: what went wrong.
        """
        self._run()
        self.wait()

    def wait(self) -> Engine:
        """Waits for the engine and returns it.

        Raises:
            MmchatError: loading failed.
        """
        return self._loaded.result()

    @property
    def is_ready(self) -> bool:
        """Whether the engine is loaded."""
        return self._loaded.done() and not self._loaded.exception()

    def __getattr__(self, name: str) -> Any:  # what only some engines have, such as count_tokens
        if name.startswith("_") or not self.is_ready:
            raise AttributeError(name)
        return getattr(self.wait(), name)

    @property
    def about(self) -> str:
        return self.wait().about

    @property
    def languages(self) -> dict[str, str]:
        return self.wait().languages

    @property
    def answers_in(self) -> tuple[str, ...]:
        return self.wait().answers_in

    @property
    def loading(self) -> str | None:
        """What a visitor reads while the models load, perhaps nothing; None when they are loaded, or failed to."""
        if self._loaded.done():
            return None
        fetched, total = megabytes_fetched()
        return f"{fetched} of {total} MB" if total else ""

    def warm_up(self) -> None:
        self.wait().warm_up()

    def load_speech(self) -> None:
        self.wait().load_speech()

    def reply(self, *arguments: Any, **options: Any) -> Iterator[str]:
        yield from self._engine().reply(*arguments, **options)

    def rewrite(self, *arguments: Any) -> Iterator[str]:
        yield from self._engine().rewrite(*arguments)

    def transcribe(self, *arguments: Any, **options: Any) -> Transcript:
        return self._engine().transcribe(*arguments, **options)

    def listen(self, *arguments: Any, **options: Any) -> Iterator[Transcript]:
        return self._engine().listen(*arguments, **options)

    def speak(self, text: str) -> tuple[np.ndarray, int]:
        return self._engine().speak(text)

    def read_aloud(self, pieces: Iterable[str]) -> Iterator[SpokenSentence]:
        return self._engine().read_aloud(pieces)

    def _engine(self) -> Engine:
        if not self._loaded.done():
            self._notify(PATIENCE)
        return self.wait()

    def _run(self) -> None:
        try:
            self._loaded.set_result(self._load())
        except Exception as error:
            self._loaded.set_exception(error)
