"""Answers in progress on llama.cpp: which context holds their KV cache, and which of them share a pass.

On a few cores, each computes its part of the answers in passes of its own: cores that share a pass wait for each other
several times in each layer. On many cores, all answers with the same weights share a pass, so that the weights are read
only once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from threading import Lock
from typing import TypeAlias

import numpy as np
import torch

from .llama_cpp import CHUNK, LlamaModel, Sequences

Result: TypeAlias = "tuple[Row, np.ndarray]"  # a row and its logits, [vocabulary]

CAPACITY, COUNT = 1024, 4  # tokens and sequences that a context can hold at first
GROWTH, SPARE = 1.5, 4  # a full context grows by the first factor; one that is larger by the second than needed shrinks
PROMPT = 0  # the sequence in which prompts are prefilled; answers have the others
FEW = 4  # the largest number of cores that compute parts of their own

_collecting = Lock()  # held by the thread that paused garbage collection


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Pauses garbage collection, which closes answers that nobody reads.

    Here it would remove a row that is being moved or computed. In the thread of another core, it would also wait for
    the engine's lock, whose holder waits for that thread.
    """
    with _collecting:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()


def parts_of(cores: int) -> int:
    """The number of parts into which the answers in progress are divided at most."""
    return cores if cores <= FEW else 1


class Weights:
    """The weights in one file, loaded on first use, and a context for each part of the answers."""

    def __init__(self, path: Path, cores: int):
        self._path = path
        self.contexts = [Context(self, cores) for _ in range(parts_of(cores))]

    @cached_property
    def model(self) -> LlamaModel:
        return LlamaModel(self._path)


class Context:
    """A llama.cpp context for answers in progress, which grows with them.

    Args:
        cores: that compute a prompt.
    """

    def __init__(self, weights: Weights, cores: int):
        self._weights, self._cores = weights, cores
        self.rows: list[Row] = []

    @cached_property
    def sequences(self) -> Sequences:
        return Sequences(self._weights.model, CAPACITY, COUNT)

    def add(self, row: Row, state: np.ndarray) -> None:
        """Adds a row with these keys and values."""
        self.reserve(row.length + 1, rows=1)
        row.sequence = self.free_sequences(1)[0]
        self.sequences.restore(row.sequence, state, row.length)
        self.rows.append(row)

    def remove(self, row: Row) -> None:
        self.rows.remove(row)
        self.sequences.clear(row.sequence)

    def free_sequences(self, number: int) -> list[int]:
        """The numbers of sequences that no row has; there must be space for them."""
        taken = {PROMPT, *(row.sequence for row in self.rows)}
        return [sequence for sequence in range(self.sequences.count) if sequence not in taken][:number]

    def reserve(self, tokens: int, rows: int = 0) -> None:
        """Makes space for this many more tokens and rows, and gives back what a crowd needed."""
        old = self.sequences
        needed, count = sum(row.length for row in self.rows) + tokens, 1 + len(self.rows) + rows
        capacity = old.capacity
        if needed > capacity:
            capacity = max(needed, int(GROWTH * capacity))
        elif capacity > SPARE * max(needed, CAPACITY):
            capacity = max(needed, CAPACITY)
        if capacity == old.capacity and count <= old.count:
            return
        new = Sequences(self._weights.model, capacity, old.count if count <= old.count else max(count, 2 * old.count))
        for row in self.rows:
            new.restore(row.sequence, old.save(row.sequence), row.length)
        self.sequences = new

    @no_garbage_collection()
    def prefill(self, embeddings: np.ndarray, state: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Extends a prompt, on all cores.

        Args:
            embeddings: [tokens, hidden_size].
            state: keys and values of at least the ``length`` tokens before them.

        Returns:
            Logits of the last token, [1, vocabulary]; keys and values of all tokens.
        """
        self.reserve(length + len(embeddings))
        if length:
            self.sequences.restore(PROMPT, state, length)
        try:
            for start in range(0, len(embeddings), CHUNK):
                chunk = embeddings[start : start + CHUNK]
                positions, last = range(length + start, length + start + len(chunk)), [len(chunk) - 1]
                logits = self.sequences.extend(chunk, positions, [PROMPT] * len(chunk), last, self._cores)
            return logits, self.sequences.save(PROMPT)
        finally:
            self.sequences.clear(PROMPT)

    def step(self, rows: Sequence[Row], token_ids: dict[Row, int], threads: int) -> list[Result]:
        """Appends a token to each of some rows → the rows with their logits, [vocabulary]."""
        self.reserve(len(rows))
        results: list[Result] = []
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            logits = self.sequences.extend(
                np.array([token_ids[row] for row in chunk], dtype=np.int32),
                [row.length for row in chunk],
                [row.sequence for row in chunk],
                range(len(chunk)),
                threads,
            )
            for row in chunk:
                row.length += 1
            results += zip(chunk, logits, strict=True)
        return results


@dataclass(eq=False)
class Row:
    """An answer in progress.

    Attributes:
        length: in tokens, with the prompt.
        part: in which it is computed.
        is_beam: whether it is one of several beams, which copy each other's tokens.
        sequence: its number in its context.
    """

    weights: Weights
    length: int
    part: int
    is_beam: bool = False
    sequence: int = field(init=False)

    @property
    def context(self) -> Context:
        return self.weights.contexts[self.part]

    def move(self, part: int) -> None:
        """Moves it to the context of another part."""
        if part != self.part:
            state = self.context.sequences.save(self.sequence)
            self.context.remove(self)
            self.part = part
            self.context.add(self, state)


@dataclass(eq=False)
class LlamaCache:
    """A ``Cache`` whose keys and values are copied into a context when they are needed."""

    weights: Weights
    with_adapter: bool
    length: int = 0  # tokens
    # Never written to, so copies share it.
    state: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint8))

    @property
    def size(self) -> int:
        return self.state.nbytes

    def prefix(self, length: int) -> LlamaCache:
        return LlamaCache(self.weights, self.with_adapter, length, self.state)


class LlamaRows:
    """``Rows``, in parts that are computed at the same time."""

    def __init__(self, cores: int):
        self._cores = cores
        self._rows: list[Row] = []
        self._is_arranged = True

    @no_garbage_collection()
    def add(self, cache: LlamaCache) -> Row:
        row = Row(cache.weights, cache.length, part=0)
        row.context.add(row, cache.state)
        self._rows.append(row)
        self._is_arranged = False
        return row

    def remove(self, row: Row) -> None:
        row.context.remove(row)
        self._rows.remove(row)
        self._is_arranged = False

    @no_garbage_collection()
    def reorder(self, rows: list[Row], sources: list[int]) -> None:
        self._is_arranged = False
        for row in rows:
            row.is_beam = True
            row.move(0)  # within a context, copies share memory
        moved = [(row, rows[source].sequence) for row, source in zip(rows, sources, strict=True)]
        moved = [(row, source) for row, source in moved if row.sequence != source]
        context = rows[0].context
        context.reserve(0, rows=len(moved))
        old = [row.sequence for row, _ in moved]
        for (row, source), free in zip(moved, context.free_sequences(len(moved)), strict=True):
            context.sequences.copy(source, free)
            row.sequence = free
        for sequence in old:
            context.sequences.clear(sequence)

    @no_garbage_collection()
    @torch.inference_mode()
    def step(self, token_ids: dict[Row, int]) -> list[tuple[Row, torch.Tensor]]:
        if not self._is_arranged:
            self._arrange()
            self._is_arranged = True
        parts: dict[int, dict[Context, list[Row]]] = {}
        for row in token_ids:
            parts.setdefault(row.part, {}).setdefault(row.context, []).append(row)
        threads = self._cores // len(parts) if parts else 0
        lengths = {row: row.length for row in token_ids}
        try:
            found = _parallel([partial(_steps, contexts, token_ids, threads) for contexts in parts.values()])
        except BaseException:  # some rows may have their token already, but nobody gets its logits
            for row, length in lengths.items():
                row.length = length
                row.context.sequences.clear(row.sequence, length)
            raise
        return [(row, torch.from_numpy(logits)) for results in found for row, logits in results]

    def _arrange(self) -> None:
        """Divides the rows evenly; those with the same weights become neighbors, and few of them move."""
        rows = [row for row in self._rows if not row.is_beam]
        rows.sort(key=lambda row: (id(row.weights), row.part))
        parts = min(parts_of(self._cores), len(rows))
        for index, row in enumerate(rows):
            row.move(index * parts // len(rows))


def _steps(contexts: dict[Context, list[Row]], token_ids: dict[Row, int], threads: int) -> list[Result]:
    """A pass for the rows of each context."""
    return [result for context, rows in contexts.items() for result in context.step(rows, token_ids, threads)]


def _parallel(work: Sequence[Callable[[], list[Result]]]) -> list[list[Result]]:
    """Calls functions at the same time, the first in this thread; returns when all have ended."""
    if not work:
        return []
    first, *others = work
    futures = [_threads().submit(function) for function in others]
    try:
        return [first(), *(future.result() for future in futures)]
    finally:
        wait(futures)  # after an error or Ctrl-C, too: the next pass must not begin before


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="llama.cpp")
