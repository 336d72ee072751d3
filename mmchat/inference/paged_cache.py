"""KV caches in pages, and passes on several of them at once, on OpenVINO.

Keys and values are stored in pages of a few tokens, like memory in an operating system (Kwon et al. 2023, arXiv
2309.06180). Sequences with a common beginning share its pages, and a pass takes sequences of any length side by side.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
import torch

from ..models.openvino_graph import PAGE, Shape, build_language_model, import_openvino

if TYPE_CHECKING:
    from openvino import CompiledModel, Core, InferRequest

INPUT_GROUP = 32  # inputs of a matrix product that are rounded to 8 bits with a common scale
PAGES, SPARE = 32, 4  # at first; room that is more than SPARE times too large is given back
KINDS = {"F32": np.float32, "I8": np.int8}  # in a safetensors file
SETTINGS = {
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_PRECISION_HINT": "f32",  # otherwise bfloat16 where the processor has it
    "KV_CACHE_PRECISION": "f16",
    "ENABLE_CPU_PINNING": False,  # a pinned thread waits for its core while other programs use it
}


@dataclass(eq=False)
class Page:
    """The place of PAGE tokens. It is free again as soon as no sequence refers to it."""

    index: int


class PagedModel:
    """A language model with the weights in one file, loaded on first use, and the pages of its sequences.

    Args:
        path: a safetensors file with the tensors of ``quantized_weights``.
        threads: that share the work.
    """

    def __init__(self, path: Path, shape: Shape, threads: int):
        self._path, self._shape, self._threads = path, shape, threads
        self._pages: WeakSet[Page] = WeakSet()
        self._room: dict[str, Any] = {}  # input → its pages, an ``openvino.Tensor``
        self._capacity = 0  # pages

    @cached_property
    def _request(self) -> InferRequest:
        file, weights = map_tensors(self._path)
        graph = build_language_model(weights, self._shape)
        try:
            request = self._tested(_compile(graph, INPUT_GROUP, self._threads))
        except RuntimeError:  # a processor for which OpenVINO has no product of 8-bit inputs
            request = self._tested(_compile(graph, 0, self._threads))
        if hasattr(mmap, "MADV_DONTNEED"):
            file.madvise(mmap.MADV_DONTNEED)  # OpenVINO refers to the file, but computes with a copy in its own layout
        return request

    def _tested(self, compiled: CompiledModel) -> InferRequest:
        """A request of the model that has computed several tokens and a single one."""
        request = compiled.create_infer_request()
        self._kinds = {tensor.any_name: tensor for tensor in compiled.inputs if "_cache." in tensor.any_name}
        self._resize(PAGES, request)
        for tokens in (2, 1):
            self._infer(request, [np.zeros((tokens, self._shape.hidden_size), np.float32)], [0], [[0]])
        return request

    @property
    def page_bytes(self) -> int:
        """The size of a page in all layers."""
        self._request  # noqa: B018 (has made the room)
        return sum(tensor.byte_size for tensor in self._room.values()) // self._capacity

    def extend(self, sequences: Sequence[PagedCache], embeddings: Sequence[np.ndarray]) -> np.ndarray:
        """Appends tokens to sequences in one pass; an error changes nothing.

        Args:
            embeddings: of the tokens of each sequence, [tokens, hidden_size].

        Returns:
            Logits of the last token of each sequence, [sequences, vocabulary].
        """
        request = self._request
        lengths = [sequence.length + len(part) for sequence, part in zip(sequences, embeddings, strict=True)]
        pages = [
            [*sequence.pages, *(self._take() for _ in range(len(sequence.pages), -(-length // PAGE)))]
            for sequence, length in zip(sequences, lengths, strict=True)
        ]
        past, places = [sequence.length for sequence in sequences], [[page.index for page in own] for own in pages]
        logits = self._infer(request, embeddings, past, places)
        for sequence, length, own in zip(sequences, lengths, pages, strict=True):
            sequence.length, sequence.pages = length, own
        return logits

    def _infer(
        self, request: InferRequest, embeddings: Sequence[np.ndarray], past: list[int], pages: list[list[int]]
    ) -> np.ndarray:
        tensor = import_openvino().Tensor
        counts = [len(part) for part in embeddings]
        begins = np.cumsum([0, *counts])
        ends = [before + tokens for before, tokens in zip(past, counts, strict=True)]
        inputs = {
            "positions": np.concatenate([np.arange(*pair) for pair in zip(past, ends, strict=True)]),
            "outputs": begins[1:] - 1,
            "past_lens": past,
            "subsequence_begins": begins,
            "block_indices": np.concatenate(pages),
            "block_indices_begins": np.cumsum([0, *map(len, pages)]),
            "max_context_len": max(ends),
        }
        tensors = {name: np.array(values, dtype=np.int32) for name, values in inputs.items()}
        tensors["embeddings"] = np.concatenate(embeddings).astype(np.float32, copy=False)
        for name, values in tensors.items():
            request.set_tensor(name, tensor(values, shared_memory=values.ndim > 0))
        request.infer()
        return np.array(request.get_tensor("logits").data)

    def copy(self, page: Page) -> Page:
        """A page with the same contents."""
        copy = self._take()
        for tensor in self._room.values():
            tensor.data[copy.index] = tensor.data[page.index]
        return copy

    def _take(self) -> Page:
        """A free page, the first that there is."""
        used = {page.index for page in self._pages}
        if len(used) >= self._capacity or self._capacity > SPARE * max(len(used), PAGES):
            self._resize(max(2 * len(used), PAGES), self._request)
            used = set(range(len(used)))
        page = Page(next(index for index in count() if index not in used))
        self._pages.add(page)
        return page

    def _resize(self, capacity: int, request: InferRequest) -> None:
        """Changes the number of pages; those in use become the first ones."""
        openvino = import_openvino()
        used = list(self._pages)
        room = {}
        for name, kind in self._kinds.items():
            dimensions = [capacity, *(size.get_length() for size in list(kind.partial_shape)[1:])]
            room[name] = openvino.Tensor(kind.element_type, openvino.Shape(dimensions))
            if used:
                room[name].data[: len(used)] = self._room[name].data[[page.index for page in used]]
            request.set_tensor(name, room[name])
        for index, page in enumerate(used):
            page.index = index
        self._room, self._capacity = room, capacity


def map_tensors(path: Path) -> tuple[mmap.mmap, dict[str, np.ndarray]]:
    """A safetensors file, mapped into memory, and its tensors, which are not read before they are used."""
    with path.open("rb") as opened:
        file = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)  # OpenVINO demands writable arrays
    start = 8 + int.from_bytes(file[:8], "little")  # of the tensors, after a header of this length
    tensors = {}
    for name, tensor in json.loads(file[8:start]).items():
        kind, (first, last) = KINDS[tensor["dtype"]], tensor["data_offsets"]
        values = np.frombuffer(file, kind, (last - first) // np.dtype(kind).itemsize, start + first)
        tensors[name] = values.reshape(tensor["shape"])
    return file, tensors


def _compile(graph: Any, input_group: int, threads: int) -> CompiledModel:
    settings = {"INFERENCE_NUM_THREADS": threads, "DYNAMIC_QUANTIZATION_GROUP_SIZE": input_group}
    return _core().compile_model(graph, "CPU", SETTINGS | settings)


@cache
def _core() -> Core:
    """The only one in this process, which is never freed.

    Where the processor has AMX, a core gives the thread that makes it a larger stack for signals. It frees that stack
    with itself, even if the thread still uses it, and the next signal ends the process.
    """
    return import_openvino().Core()


@dataclass(eq=False)
class PagedCache:
    """A ``Cache`` in pages, also the row of an answer in progress."""

    model: PagedModel
    with_adapter: bool
    length: int = 0  # tokens
    pages: list[Page] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.pages) * self.model.page_bytes

    def prefix(self, length: int) -> PagedCache:
        """Shares all pages but one that is not full: the next tokens are written there."""
        full = length // PAGE
        pages = self.pages[:full]
        if length % PAGE:
            pages.append(self.model.copy(self.pages[full]))
        return PagedCache(self.model, self.with_adapter, length, pages)


class PagedRows:
    """``Rows``, of which all with the same weights share a pass.

    Args:
        embedding: a token id → its embedding, [hidden_size].
    """

    def __init__(self, embedding: Callable[[int], np.ndarray]):
        self._embedding = embedding

    def add(self, cache: PagedCache) -> PagedCache:
        return cache.prefix(cache.length)

    def remove(self, row: PagedCache) -> None:
        row.pages = []

    def reorder(self, rows: list[PagedCache], sources: list[int]) -> None:
        moved = [(row, rows[source]) for row, source in zip(rows, sources, strict=True) if row is not rows[source]]
        for row, copy in [(row, self.add(source)) for row, source in moved]:
            row.pages = copy.pages

    def step(self, token_ids: dict[PagedCache, int]) -> list[tuple[PagedCache, torch.Tensor]]:
        results: list[tuple[PagedCache, torch.Tensor]] = []
        for model in {row.model for row in token_ids}:
            rows = [row for row in token_ids if row.model is model]
            logits = model.extend(rows, [self._embedding(token_ids[row])[None] for row in rows])
            results += zip(rows, torch.from_numpy(logits), strict=True)
        return results
