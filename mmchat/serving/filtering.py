"""Content filter: questions and answers pass a function that may hold them back. Off by default; nothing is logged."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import cache

from ..conversation import Engine, Message, SamplingOptions, dialogue_turns
from ..conversation import logger as conversation_logger
from ..errors import BadInput
from .wrapper import EngineWrapper

logger = logging.getLogger(__name__)

IsHeld = Callable[[str], bool]  # text → whether to hold it back
DEFAULT = "mmchat.serving.filtering:has_listed_word"
WINDOW = 2_000  # characters; of a long answer, its end is checked
HELD_WORDS = 4  # the last words of an answer wait for the next ones, with which they may form a listed phrase
QUESTION_HELD = "I would rather not answer that here. Please put your question in other words."
ANSWER_HELD = "I would rather not say this here. Please ask in another way."
CONTINUATION_HELD = " … I would rather stop here. Please ask in another way."


@cache
def _word_list() -> IsHeld:
    from glin_profanity import Filter

    words = Filter({"languages": ["english"], "detect_leetspeak": True, "normalize_unicode": True})
    return lambda text: bool(words.is_profane(text))


def has_listed_word(text: str) -> bool:
    """Whether a text has a word of glin-profanity's English list, also in look-alike letters."""
    return _word_list()(text)


def load_filter(name: str) -> IsHeld:
    """Imports the function that MMCHAT_FILTER names, module:function; "1" is the word list.

    Raises:
        BadInput: there is no such function, or its library is missing.
    """
    module, _, function = (DEFAULT if name in ("1", "on", "true") else name).partition(":")
    try:
        found: IsHeld = getattr(importlib.import_module(module), function)
        found("Hello.")  # a missing library shows now
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise BadInput(
            "MMCHAT_FILTER must be module:function, a function from a text to whether it is held back, or 1 for the "
            "word list, which needs pip install glin-profanity."
        ) from error
    return found


class FilteringEngine(EngineWrapper):
    """Holds back questions and answers. No held-back word leaves it, also while an answer is being written.

    Args:
        holds: called each time that it holds something back.
    """

    def __init__(self, engine: Engine, is_held: IsHeld, holds: Callable[[], None] = lambda: None):
        super().__init__(engine)
        self._function, self._holds = is_held, holds

    def reply(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        notify: Callable[[str], None] = conversation_logger.warning,
    ) -> Iterator[str]:
        if messages and self._is_held(messages[-1].text):
            self._holds()
            yield QUESTION_HELD
            return
        turns = dialogue_turns(messages)
        kept = [turn for turn in turns if not any(self._is_held(message.text) for message in turn)]
        said = [message for turn in kept for message in turn]
        yield from self._checked(self.engine.reply(said, options, notify=notify))

    def rewrite(self, question: str, draft: str, options: SamplingOptions | None = None) -> Iterator[str]:
        if self._is_held(question):
            self._holds()
            yield QUESTION_HELD
        elif self._is_held(draft):
            self._holds()
            yield ANSWER_HELD
        else:
            yield from self._checked(self.engine.rewrite(question, draft, options))

    def _checked(self, pieces: Iterator[str]) -> Iterator[str]:
        """Yields text once the few words after it have passed the filter, too."""
        shown, waiting = "", ""
        with closing(pieces):  # type: ignore[type-var]
            for piece in pieces:
                waiting += piece
                ends = [match.start() for match in re.finditer(r"\s+\S", waiting)]
                if len(ends) <= HELD_WORDS:
                    continue
                if self._is_held(shown[-WINDOW:] + waiting):
                    break
                free = ends[-HELD_WORDS - 1]
                if free:
                    yield type(piece)(waiting[:free])  # a CachedText stays one
                    shown, waiting = (shown + waiting[:free])[-WINDOW:], waiting[free:]
            else:
                if not self._is_held(shown[-WINDOW:] + waiting):
                    if waiting:
                        yield type(piece)(waiting)
                    return
        self._holds()
        yield CONTINUATION_HELD if shown else ANSWER_HELD

    def _is_held(self, text: str) -> bool:
        try:
            return bool(self._function(text))
        except Exception as error:  # a filter that fails lets nothing through
            logger.error("The content filter failed: %s", type(error).__name__)
            return True
