"""Continuous batching: all answers in progress advance in one pass.

A pass reads every weight once, however many rows it has, so answers generated together take less time than one after
the other. They join after their prompt is prefilled and leave between tokens (Yu et al. 2022, Orca, OSDI 22).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch

from .sampling import Sampler

if TYPE_CHECKING:
    from .decoder import Cache

MAX_UNREAD = 2  # maximum number of unread tokens per answer, so that a slow reader does not hold up work


class Rows(Protocol):
    """KV caches side by side, one per answer in progress. A row is a sequence."""

    def add(self, cache: Any) -> Any:
        """Adds a sequence whose KV cache starts as a copy of ``cache``, which is not modified → its hashable handle."""

    def remove(self, row: Any) -> None:
        """Removes a row."""

    def reorder(self, rows: list[Any], sources: list[int]) -> None:
        """Replaces each ``rows[i]`` with a copy of what ``rows[sources[i]]`` was; all of them are equally long."""

    def step(self, token_ids: dict[Any, int]) -> Iterable[tuple[Any, torch.Tensor]]:
        """Appends one token each to these rows, and none to the others → the rows with their logits, [vocabulary]."""


class Answer:
    """An answer in progress."""

    def __init__(self, sampler: Sampler, stop_ids: set[int], max_new_tokens: int):
        self._sampler, self._stop_ids, self._remaining = sampler, stop_ids, max_new_tokens
        self._unread: deque[int] = deque()  # tokens that its reader has not taken
        self.last = -1  # the newest token, which the model has not seen
        self.is_complete = self.is_closed = False
        self._error: Exception | None = None

    @property
    def can_grow(self) -> bool:
        """Whether the next pass may write a token."""
        return not self.is_complete and len(self._unread) < MAX_UNREAD

    def extend(self, logits: torch.Tensor) -> None:
        """Chooses the next token from logits, [vocabulary]. An error is kept for the answer's own reader."""
        try:
            self.last = self._sampler(logits)
        except Exception as error:
            self._error, self.is_complete = error, True
            return
        self._remaining -= 1
        is_stop = self.last in self._stop_ids
        self.is_complete = is_stop or not self._remaining
        if not is_stop:
            self._unread.append(self.last)

    def take(self) -> Iterator[int]:
        """The tokens that are there but not yet taken."""
        while self._unread:
            yield self._unread.popleft()
        if self._error:
            raise self._error


class Batch:
    """The answers in progress on one decoder.

    No thread runs it. A caller that needs a missing token holds the engine's lock and computes the next token of every
    answer. Nothing is computed unless somebody asks for a token.

    Args:
        rows: an empty batch of KV caches.
    """

    def __init__(self, rows: Rows):
        self.rows = rows
        self._answers: dict[Any, Answer] = {}  # row -> answer
        self._is_running = False

    def __len__(self) -> int:
        return len(self._answers)

    def generate(self, answer: Answer, cache: Cache, logits: torch.Tensor) -> Iterator[int]:
        """Streams the tokens of an answer, without the stop token. Closing the iterator takes it out of the batch.

        Args:
            cache: of the prompt; it is copied when the first token is requested.
            logits: of the prompt's last token, [vocabulary].
        """
        answer.extend(logits)
        try:
            if not answer.is_complete:  # before the first token is given away: the cache may be extended then
                self._answers[self.rows.add(cache)] = answer
            yield from answer.take()
            while not answer.is_complete:
                self._advance()
                yield from answer.take()
        finally:
            answer.is_closed = True
            if not self._is_running:  # garbage collection may close another answer's iterator in the middle of a pass
                self._remove_closed()

    def _advance(self) -> None:
        """Computes the next token of every answer that is not too far ahead of its reader."""
        self._remove_closed()
        token_ids = {row: answer.last for row, answer in self._answers.items() if answer.can_grow}
        self._is_running = True
        try:
            for row, logits in self.rows.step(token_ids):
                self._answers[row].extend(logits)
        finally:
            self._is_running = False

    def _remove_closed(self) -> None:
        for row in [row for row, answer in self._answers.items() if answer.is_closed]:
            self.rows.remove(row)
            del self._answers[row]
