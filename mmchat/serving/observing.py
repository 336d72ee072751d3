"""Watches an engine for metrics and logs: counts and times, never user text."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..conversation import Engine, Message, SamplingOptions, Transcript
from ..conversation import logger as conversation_logger
from ..errors import MmchatError
from .caching import CachedText
from .wrapper import EngineWrapper

logger = logging.getLogger(__name__)

ANSWERED, STOPPED, HELD = "answered", "stopped", "held"
REFUSAL = "refusal"

Observer = Callable[["Observation"], None]


@dataclass
class Observation:
    """What is known about one request when it is over.

    Attributes:
        kind: "reply", "rewrite" or "transcribe"; "refusal" by the queue, the rate limit or the content filter.
        outcome: "answered", "stopped", "held" by the content filter, or the name of the error.
        pieces: of text; nearly always one token each.
        first_seconds: time to the first piece; None if there was none.
        speech_seconds: of a recording.
    """

    kind: str
    outcome: str = ANSWERED
    turns: int = 0
    pictures: int = 0
    pieces: int = 0
    cached: bool = False
    seconds: float = 0.0
    first_seconds: float | None = None
    speech_seconds: float = 0.0
    started: float = field(default=0.0, repr=False)

    @property
    def failed(self) -> bool:
        """Whether it ended with an error."""
        return self.outcome not in (ANSWERED, STOPPED, HELD)


class ObservedEngine(EngineWrapper):
    """Tells observers about each request when it is over."""

    def __init__(self, engine: Engine, observers: Sequence[Observer]):
        super().__init__(engine)
        self._observers = observers

    def transcribe(self, path: str | Path, language: str | None = None, task: str = "transcribe") -> Transcript:
        *_, whole = self.listen(path, language, task)
        return whole

    def listen(self, path: str | Path, language: str | None = None, task: str = "transcribe") -> Iterator[Transcript]:
        with self._told(Observation("transcribe")) as observation:
            for transcript in self.engine.listen(path, language, task):
                observation.speech_seconds = sum(part.end - part.start for part in transcript.segments)
                yield transcript

    def reply(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        notify: Callable[[str], None] = conversation_logger.warning,
    ) -> Iterator[str]:
        pictures = sum(len(message.images) for message in messages)
        observation = Observation("reply", turns=len(messages), pictures=pictures)
        return self._watched(self.engine.reply(messages, options, notify=notify), observation)

    def rewrite(self, question: str, draft: str, options: SamplingOptions | None = None) -> Iterator[str]:
        return self._watched(self.engine.rewrite(question, draft, options), Observation("rewrite", turns=1))

    def _watched(self, pieces: Iterator[str], observation: Observation) -> Iterator[str]:
        with self._told(observation), closing(pieces):  # type: ignore[type-var]
            for piece in pieces:
                if observation.first_seconds is None:
                    observation.first_seconds = time.monotonic() - observation.started
                observation.pieces += 1
                observation.cached = isinstance(piece, CachedText)
                yield piece

    @contextmanager
    def _told(self, observation: Observation) -> Iterator[Observation]:
        """Times the block, records how it ended, and notifies the observers."""
        observation.started = time.monotonic()
        try:
            yield observation
        except GeneratorExit:
            observation.outcome = STOPPED
            raise
        except Exception as error:
            observation.outcome = _name(error)
            raise
        finally:
            observation.seconds = time.monotonic() - observation.started
            for observe in self._observers:
                observe(observation)


def tell_refusal(observers: Sequence[Observer], outcome: str) -> None:
    """Tells observers of a question that is turned away before ``ObservedEngine`` sees it, or while it is answered."""
    for observe in observers:
        observe(Observation(REFUSAL, outcome))


def _name(error: Exception) -> str:
    return type(error).__name__ if isinstance(error, MmchatError) else "failure"


def log(observation: Observation) -> None:
    """Logs a request; ``JsonFormatter`` writes the fields."""
    facts = {name: value for name, value in asdict(observation).items() if name != "started"}
    logger.info("request", extra={"facts": facts})
