"""The base class of wrappers around an engine: caching, filtering, observing, queueing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversation import Engine, Message, SamplingOptions, Transcript, logger

if TYPE_CHECKING:
    import numpy as np

    from ..models.text_to_speech import SpokenSentence


class EngineWrapper:
    """Passes everything on to an engine, also what only some engines have."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        if name == "engine":  # not yet set
            raise AttributeError(name)
        return getattr(self.engine, name)

    @property
    def about(self) -> str:
        return self.engine.about

    def warm_up(self) -> None:
        self.engine.warm_up()

    def load_speech(self) -> None:
        self.engine.load_speech()

    def transcribe(self, path: str | Path, language: str | None = None, task: str = "transcribe") -> Transcript:
        return self.engine.transcribe(path, language, task)

    def listen(self, path: str | Path, language: str | None = None, task: str = "transcribe") -> Iterator[Transcript]:
        return self.engine.listen(path, language, task)

    def speak(self, text: str) -> tuple[np.ndarray, int]:
        return self.engine.speak(text)

    def read_aloud(self, pieces: Iterable[str]) -> Iterator[SpokenSentence]:
        return self.engine.read_aloud(pieces)

    def reply(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> Iterator[str]:
        return self.engine.reply(messages, options, notify=notify)

    def rewrite(self, question: str, draft: str, options: SamplingOptions | None = None) -> Iterator[str]:
        return self.engine.rewrite(question, draft, options)
