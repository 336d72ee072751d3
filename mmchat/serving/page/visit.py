"""One visit to the page: which request may write to it, and what that request brings along."""

from __future__ import annotations

from typing import Any


class Visit:
    """One visit to the page. Each request gets an id, and only the latest request may write to the page.

    This is how Stop, New chat, Undo and a new question end a reply. With gradio's own ``cancels``, the old reply would
    overwrite the new question, and cancelling works only once.

    Attributes:
        latest: id of the latest request.
        earlier: the answers that this request's answer joins, after a retry; see ``branches``.
        speech_seconds: length of the speech that was transcribed for this request, or 0.
    """

    def __init__(self) -> None:
        self.latest = 0
        self.earlier: list[Any] = []
        self.speech_seconds = 0.0

    def request(self, earlier: list[Any] | None = None, speech_seconds: float = 0.0) -> int:
        """Starts a request, which ends the previous one."""
        self.latest += 1
        self.earlier, self.speech_seconds = earlier or [], speech_seconds
        return self.latest
