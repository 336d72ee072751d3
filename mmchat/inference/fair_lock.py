"""A fair lock: waiting threads come first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock


class FairLock:
    """A lock that alternates between threads that keep asking for it.

    A waiter queues on ``_next``, so the thread that releases the lock cannot grab it again at once. A thread that holds
    the lock must not enter it again; it may enter ``reentrant``.
    """

    def __init__(self) -> None:
        self._current, self._next = RLock(), Lock()

    def __enter__(self) -> None:
        with self._next:
            self._current.acquire()

    def __exit__(self, *_: object) -> None:
        self._current.release()

    @contextmanager
    def reentrant(self) -> Iterator[None]:
        """The lock for a thread that may hold it already; skips the queue."""
        with self._current:
            yield
