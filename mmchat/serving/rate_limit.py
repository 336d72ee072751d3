"""Rate limit: questions per minute from one address."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from threading import Lock

from ..errors import BadInput, counted

MINUTE = 60  # seconds
MAX_ADDRESSES = 10_000  # the least recently seen ones are forgotten


def questions_per_minute(text: str) -> int:
    """Parses --rate-limit or MMCHAT_RATE_LIMIT.

    Raises:
        BadInput: the text is not a whole number, or is negative.
    """
    try:
        count = int(text)
    except ValueError:
        count = -1
    if count < 0:
        raise BadInput(
            f"The rate limit must be a whole number of questions per minute, or 0 for no limit, not '{text}'."
        )
    return count


class RateLimit:
    """A sliding-window limit on the questions from one address.

    Args:
        per_minute: questions within any minute; 0 for no limit.
        clock: returns the time in seconds.
        refused: called for each question that is turned away.
    """

    def __init__(
        self,
        per_minute: int,
        clock: Callable[[], float] = time.monotonic,
        refused: Callable[[], None] = lambda: None,
    ):
        self.per_minute, self._clock, self._refused = per_minute, clock, refused
        self._asked: OrderedDict[str, deque[float]] = OrderedDict()  # address -> times of its last questions
        self._lock = Lock()

    def count(self, address: str) -> None:
        """Counts a question.

        Raises:
            BadInput: the address is over its limit; the question is not counted.
        """
        wait = self._count(address)
        if wait:
            self._refused()
            limit = counted(self.per_minute, "question")
            raise BadInput(f"That is more than {limit} per minute. Please wait {wait} seconds.")

    def admits(self, address: str) -> bool:
        """Counts a question, unless the address is over its limit: for work that waits and asks again."""
        return not self._count(address)

    def _count(self, address: str) -> int:
        """Counts a question and returns 0, or does not count it and returns the seconds to wait."""
        if not self.per_minute:
            return 0
        with self._lock:
            now, times = self._clock(), self._asked.setdefault(address, deque())
            self._asked.move_to_end(address)
            if len(self._asked) > MAX_ADDRESSES:
                self._asked.popitem(last=False)
            while times and times[0] <= now - MINUTE:
                times.popleft()
            if len(times) >= self.per_minute:
                return int(times[0] + MINUTE - now) + 1
            times.append(now)
            return 0
