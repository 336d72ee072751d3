"""Answers on ZeroGPU, where a Space borrows a GPU for each call of a decorated function."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from ..conversation import Message, SamplingOptions
from ..device import on_zero_gpu
from ..engine import Engine

logger = logging.getLogger(__name__)

START, TOKENS_PER_SECOND = 10, 10  # seconds before the first token; a cautious speed after it


def seconds_needed(messages: Sequence[Message], options: SamplingOptions) -> int:
    """How long the GPU is asked for: shorter requests wait less, and use up less of a visitor's quota."""
    return START + options.max_new_tokens // TOKENS_PER_SECOND


def lend_gpu(engine: Engine) -> Engine:
    """The engine, whose replies borrow a GPU where this is a Space on ZeroGPU; elsewhere just the engine."""
    if not on_zero_gpu():
        return engine
    import spaces

    reply_here = engine.reply

    @spaces.GPU(duration=seconds_needed)
    def borrow(messages: Sequence[Message], options: SamplingOptions) -> Iterator[tuple[str, str]]:
        # Runs in a process of its own: what comes out is pickled, so notices travel with the text.
        notices: list[str] = []
        with closing(reply_here(messages, options, notices.append)) as pieces:
            for piece in pieces:
                yield from (("notice", notices.pop(0)) for _ in range(len(notices)))
                yield "text", piece

    def reply(
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> Iterator[str]:
        with closing(borrow(messages, options or SamplingOptions())) as parts:
            for kind, text in parts:
                if kind == "notice":
                    notify(text)
                else:
                    yield text

    engine.reply = reply
    return engine
