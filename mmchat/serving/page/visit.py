"""One visit to the page: which request may write to it, and what that request brings along."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Lock
from typing import Any

SEND_SECONDS = 2.0  # longest wait for what the previous request is just sending


class Visit:
    """One visit to the page. Each request gets an id, and only the latest request may write to the page.

    This is how New chat, Undo and a new question end a reply; Stop ends it, too, and keeps what is there. With gradio's
    own ``cancels``, the old reply would overwrite the new question, and canceling works only once.

    Attributes:
        latest: id of the latest request.
        is_stopped: whether the visitor pressed Stop since.
        answering: id of the request whose answer is expected or being written; None if there is none.
        earlier: the answers that this request's answer joins, after a retry; see ``branches``.
        speech_seconds: length of the speech that was transcribed for this request, or 0.
        is_hands_free: whether this request was spoken hands-free, so that its answer is read aloud.
        unsent_speech: length of the speech whose transcript waits in the question box, or 0.
    """

    def __init__(self) -> None:
        self.latest = 0
        self.is_stopped = False
        self.answering: int | None = None
        self.earlier: list[Any] = []
        self.speech_seconds = self.unsent_speech = 0.0
        self.is_hands_free = False
        self._lock, self._is_sent = Lock(), Event()
        self._is_sent.set()

    def __deepcopy__(self, _: Any) -> Visit:  # gradio copies the first one for each visitor
        return Visit()

    def request(
        self, earlier: list[Any] | None = None, speech_seconds: float = 0.0, is_hands_free: bool = False
    ) -> int:
        """Starts a request, which ends the previous one. What that one is just sending reaches the page first."""
        with self._lock:
            self.latest += 1
            mine = self.latest
            self.is_stopped, self.answering = False, None
            self.earlier, self.speech_seconds = earlier or [], speech_seconds
            self.is_hands_free = is_hands_free
        self._is_sent.wait(SEND_SECONDS)
        return mine

    def is_over(self, request_id: int) -> bool:
        """Whether the visitor ended a request: with Stop, or with another one."""
        return self.is_stopped or self.latest != request_id

    @contextmanager
    def writing(self, request_id: int) -> Iterator[bool]:
        """Whether a request may write to the page. Yield to gradio inside: it comes back when it has sent the value."""
        with self._lock:
            is_latest = self.latest == request_id
            if is_latest:
                self._is_sent.clear()
        try:
            yield is_latest
        finally:
            if is_latest:
                self._is_sent.set()
