"""How often one address may ask."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from threading import Lock

from ..errors import BadInput

MINUTE = 60  # seconds
REMEMBERED = 10_000  # addresses; the ones heard of longest ago are forgotten


def questions_per_minute(text: str) -> int:
    """What --rate-limit or MMCHAT_RATE_LIMIT says.

    Raises:
        BadInput: it is not a whole number, or below 0.
    """
    try:
        count = int(text)
    except ValueError:
        count = -1
    if count < 0:
        raise BadInput(f"The rate limit is a whole number of questions per minute, or 0 for no limit, not '{text}'.")
    return count


class RateLimit:
    """At most so many questions of one address within any minute.

    Args:
        per_minute: how many; 0 for any number.
        clock: tells seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self.per_minute, self._clock = per_minute, clock
        self._asked: OrderedDict[str, deque[float]] = OrderedDict()  # address -> when it asked, in the last minute
        self._lock = Lock()

    def count(self, address: str) -> None:
        """Counts a question.

        Raises:
            BadInput: there were too many, and this one does not count.
        """
        if not self.per_minute:
            return
        with self._lock:
            now, times = self._clock(), self._asked.setdefault(address, deque())
            self._asked.move_to_end(address)
            if len(self._asked) > REMEMBERED:
                self._asked.popitem(last=False)
            while times and times[0] <= now - MINUTE:
                times.popleft()
            if len(times) >= self.per_minute:
                wait = int(times[0] + MINUTE - now) + 1
                raise BadInput(f"That is more than {self.per_minute} questions a minute. Please wait {wait} seconds.")
            times.append(now)
