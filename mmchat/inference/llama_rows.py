"""Answers in progress on llama.cpp: which context holds their KV cache, and which of them share a pass.

On a machine with few cores, a few answers get a core each. Where memory limits the speed, one core computes a token
about as fast as two, and what it has just read is still in the processor's cache when another core needs it.
llama.cpp's pass for several tokens takes longer than as many passes for one, until CROWD answers have the same weights.
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
CROWD, CALM = 6, 4  # answers with the same weights that start sharing passes, and the fewest that still do

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


class Weights:
    """The weights in one file, loaded on first use, and a context for each of some cores."""

    def __init__(self, path: Path, cores: int):
        self._path = path
        self.contexts = [Context(self, cores) for _ in range(cores)]
        self.is_crowded = False

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
        """Appends a token to each of some rows in one pass → the rows with their logits, [vocabulary]."""
        logits = self.sequences.extend(
            np.array([token_ids[row] for row in rows], dtype=np.int32),
            [row.length for row in rows],
            [row.sequence for row in rows],
            range(len(rows)),
            threads,
        )
        for row in rows:
            row.length += 1
        return list(zip(rows, logits, strict=True))


@dataclass(eq=False)
class Row:
    """An answer in progress.

    Attributes:
        length: in tokens, with the prompt.
        core: that its context belongs to.
        is_apart: whether that core computes it alone, instead of all cores together with other rows.
        is_beam: whether it is one of several beams, which copy each other's tokens.
        sequence: its number in its context.
    """

    weights: Weights
    length: int
    core: int
    is_apart: bool = True
    is_beam: bool = False
    sequence: int = field(init=False)

    @property
    def context(self) -> Context:
        return self.weights.contexts[self.core]

    def move(self, core: int) -> None:
        """Moves it to the context of another core."""
        if core != self.core:
            state = self.context.sequences.save(self.sequence)
            self.context.remove(self)
            self.core = core
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
    """``Rows``, which share passes on all cores or have a core each."""

    def __init__(self, cores: int):
        self._cores = cores
        self._rows: list[Row] = []
        self._is_arranged = True

    @no_garbage_collection()
    def add(self, cache: LlamaCache) -> Row:
        row = Row(cache.weights, cache.length, self._by_load()[0])
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
        for context in {row.context for row in token_ids}:
            context.reserve(sum(row.context is context for row in token_ids))
        results = self._step_together(token_ids) + self._step_apart(token_ids)
        return [(row, torch.from_numpy(logits)) for row, logits in results]

    def _step_together(self, token_ids: dict[Row, int]) -> list[Result]:
        """Passes of all rows with the same weights, on all cores."""
        results: list[Result] = []
        for weights in {row.weights for row in token_ids}:
            rows = [row for row in token_ids if row.weights is weights and not row.is_apart]
            for start in range(0, len(rows), CHUNK):
                results += weights.contexts[0].step(rows[start : start + CHUNK], token_ids, self._cores)
        return results

    def _step_apart(self, token_ids: dict[Row, int]) -> list[Result]:
        """Passes of one row, on one core each."""
        rows = [row for row in token_ids if row.is_apart]

        def steps(core: int) -> list[Result]:
            return [result for row in rows if row.core == core for result in row.context.step([row], token_ids, 1)]

        found = _parallel([partial(steps, core) for core in {row.core for row in rows}])
        return [result for results in found for result in results]

    def _arrange(self) -> None:
        """Decides which rows have a core of their own, spreads these evenly, and brings the others together."""
        for weights in {row.weights for row in self._rows}:
            number = sum(row.weights is weights for row in self._rows)
            weights.is_crowded = number >= (CALM if weights.is_crowded else CROWD)
        few = [row for row in self._rows if not (row.is_beam or row.weights.is_crowded)]
        for row in self._rows:
            row.is_apart = row in few and len(few) >= self._cores  # fewer would leave cores idle
            if not row.is_apart:
                row.move(0)
        while True:
            idlest, busiest = (self._by_load()[index] for index in (0, -1))
            if self._load(busiest) - self._load(idlest) < 2:
                return
            next(row for row in self._rows if row.is_apart and row.core == busiest).move(idlest)

    def _load(self, core: int) -> int:
        """The number of rows that a core has to itself."""
        return sum(row.is_apart and row.core == core for row in self._rows)

    def _by_load(self) -> list[int]:
        """The cores, that with the fewest rows first."""
        return sorted(range(self._cores), key=self._load)


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
