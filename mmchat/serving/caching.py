"""Answer cache: the same greedy question about the same pictures is answered from memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from threading import Lock

from ..conversation import Engine, Message, SamplingOptions, logger
from ..errors import BadInput
from ..media import picture_digest
from .wrapper import EngineWrapper

MAX_CHARACTERS = 20_000  # of an answer; longer ones are not kept


class CachedText(str):
    """A piece of an answer that comes from the cache."""


def answers_cached(text: str) -> int:
    """Parses MMCHAT_ANSWER_CACHE, the number of answers to keep.

    Raises:
        BadInput: it is not a whole number.
    """
    if not text.isascii() or not text.isdigit():
        raise BadInput(f"MMCHAT_ANSWER_CACHE must be a whole number of answers, not '{text}'.")
    return int(text)


class CachingEngine(EngineWrapper):
    """Keeps whole answers to greedy questions, which would be the same again; the least recently used go first.

    It belongs to one engine, hence to one set of weights. Its answers come in ``CachedText``, piece by piece as usual.
    """

    def __init__(self, engine: Engine, max_answers: int):
        super().__init__(engine)
        self._max_answers = max_answers
        self._answers: OrderedDict[Hashable, tuple[list[str], list[str]]] = OrderedDict()  # (pieces, notices)
        self._lock = Lock()

    def reply(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> Iterator[str]:
        options = options or SamplingOptions()
        key = _key(messages, options)
        with self._lock:
            known = self._answers.get(key)
            if known:
                self._answers.move_to_end(key)
        if known:
            for notice in known[1]:
                notify(notice)
            yield from map(CachedText, known[0])
            return
        pieces: list[str] = []
        notices: list[str] = []

        def heard(notice: str) -> None:
            notices.append(notice)
            notify(notice)

        with closing(self.engine.reply(messages, options, notify=heard)) as answer:  # type: ignore[type-var]
            for piece in answer:
                pieces.append(piece)
                yield piece
        if key is not None and pieces and sum(map(len, pieces)) <= MAX_CHARACTERS:  # stopped answers never get here
            with self._lock:
                self._answers[key] = (pieces, notices)
                if len(self._answers) > self._max_answers:
                    self._answers.popitem(last=False)


def _key(messages: Sequence[Message], options: SamplingOptions) -> Hashable | None:
    """The cache key; None if the answer is sampled."""
    if options.temperature > 0 and options.beams == 1:
        return None
    said = tuple((each.role, each.text.strip(), tuple(map(picture_digest, each.images))) for each in messages)
    return said, replace(options, temperature=0, top_p=1, seed=None)
