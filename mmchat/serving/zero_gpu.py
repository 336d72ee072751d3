"""Replies on ZeroGPU, which lends a Space a GPU for each call of a decorated function."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

from ..conversation import Engine, Message, SamplingOptions, rewrite_request
from ..device import on_zero_gpu

logger = logging.getLogger(__name__)

START_SECONDS, TOKENS_PER_SECOND = 10, 10  # time to the first token, and a conservative speed after it


def seconds_needed(messages: Sequence[Message], options: SamplingOptions) -> int:
    """Seconds of GPU time to request: shorter requests wait less and use less of a visitor's quota."""
    return START_SECONDS + options.max_new_tokens // TOKENS_PER_SECOND


class ZeroGpuEngine:
    """An engine whose replies borrow a GPU."""

    prefill = None  # no GPU is borrowed before there is a question

    def __init__(self, engine: Engine):
        import spaces

        self._engine = engine
        self._borrow = spaces.GPU(duration=seconds_needed)(self._reply_on_gpu)

    @property
    def about(self) -> str:
        return self._engine.about

    def warm_up(self) -> None:
        self._engine.warm_up()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)  # hearing and speaking need no GPU

    def reply(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> Iterator[str]:
        with closing(self._borrow(messages, options or SamplingOptions())) as parts:
            for kind, text in parts:
                if kind == "notice":
                    notify(text)
                else:
                    yield text

    def rewrite(self, question: str, draft: str, options: SamplingOptions | None = None) -> Iterator[str]:
        return self.reply([rewrite_request(question, draft)], options)

    def _reply_on_gpu(self, messages: Sequence[Message], options: SamplingOptions) -> Iterator[tuple[str, str]]:
        """Runs in another process. Its output is pickled, so notices travel in the stream with the text."""
        notices: list[str] = []
        with closing(self._engine.reply(messages, options, notices.append)) as pieces:
            for piece in pieces:
                yield from (("notice", notices.pop(0)) for _ in range(len(notices)))
                yield "text", piece


def lend_gpu(engine: Engine) -> Engine:
    """Wraps the engine on ZeroGPU; elsewhere returns it unchanged."""
    return ZeroGpuEngine(engine) if on_zero_gpu() else engine
