"""What happened while an answer was made: a folded message before the answer, never a part of its text."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from ...conversation import Engine, Message
from ...errors import counted
from ..caching import CachedText
from .history import History, Turn, said

logger = logging.getLogger(__name__)

MIN_TOKENS = 5  # shorter answers get no speed
DETAILS = "Details"  # title of the folded message


def working(title: str, log: str = "") -> Turn:
    """A row that says what is going on."""
    return {**said(""), "metadata": {"title": title, "log": log, "status": "pending"}}


def in_line(position: int) -> Turn:
    """The row of a question that waits for its turn."""
    return working("Waiting in line", f"place {position}")


@dataclass
class Stopwatch:
    """Times an answer."""

    begun: float = field(default_factory=time.monotonic)
    first: float | None = None  # seconds to the first piece of text
    pieces: int = 0

    def piece(self) -> None:
        """A piece of the answer has come."""
        self.pieces += 1
        if self.first is None:
            self.first = self.seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun


def details(
    engine: Engine, messages: list[Message], answer: History, watch: Stopwatch, speech_seconds: float = 0
) -> Turn:
    """The folded message about an answer, which its draft may precede."""
    text, is_rewritten = answer[-1]["content"], len(answer) > 1
    seconds, first = watch.seconds, watch.first or 0
    told = _ask(engine, text, messages)
    tokens = told.get("tokens", 0)
    lines = [f"Model: {told['model']}"] if told.get("model") else []
    if tokens:
        lines.append(f"Length: {counted(tokens, 'token')}")
    is_timed = watch.pieces > 1 and not is_rewritten and not isinstance(text, CachedText)  # while it was written
    if is_timed and tokens >= MIN_TOKENS and seconds > first:
        lines.append(f"Speed: {(tokens - 1) / (seconds - first):.0f} tokens per second")
    lines.append(f"Time to the first token: {first:.2f} s")
    if speech_seconds:
        lines.append(f"Speech: {speech_seconds:.1f} s")
    for number, classes in enumerate(told.get("classes", ()), start=1):
        if classes:
            lines.append(f"Seen in picture {number}: {', '.join(classes)}")
    if isinstance(text, CachedText):
        lines.append("From the cache: the same question was answered before")
    log = counted(tokens, "token") if tokens else ""
    metadata = {"title": DETAILS, "log": log, "duration": round(seconds, 2), "status": "done"}
    return {**said("\n".join(f"- {line}" for line in lines)), "metadata": metadata}


def _ask(engine: Engine, text: str, messages: list[Message]) -> dict[str, Any]:
    """Facts from the engine; none if it has no ``details`` or fails, because the answer is already complete."""
    try:
        return engine.details(text, messages[-1].images) if hasattr(engine, "details") else {}
    except Exception as error:
        logger.debug("details", exc_info=error)
        return {}
