"""A decoder on llama.cpp with 8-bit weights and inputs, for the CPU.

Decoding reads every weight once per token, so it is bound by memory bandwidth: smaller weights are faster. Blocks of 32
weights, and of 32 inputs of each matrix product, are rounded to 8 bits with a common scale (Q8_0), so logits are close
but not equal to PyTorch's. The adapter is merged into weights of its own: beside the base model's, it would cost two
small products for each layer. Of PyTorch's weights, only the token embeddings are read.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..errors import MmchatError
from ..fetching.cache import convert_once, remove_oldest
from ..models.gguf_tensors import ARCHITECTURES, language_model_writer, write_language_model
from ..models.language_model import base_model
from ..models.stored_language_model import StoredLanguageModel, has_adapter, loaded
from .batch import Batch
from .llama_cpp import CHUNK, LlamaModel, Sequences, load_library

logger = logging.getLogger(__name__)

CAPACITY, COUNT = 1024, 4  # tokens and sequences for which there is room at first
PROMPT = 0  # the sequence in which prompts are prefilled; answers have the others
FILE = "model.gguf"
CACHED_BYTES = 4e9  # of converted models, of which each adapter has its own
NO_VOCABULARY = "none"  # llama.cpp's name for a model that is given no text


def load_llama_decoder(model: nn.Module) -> LlamaDecoder | None:
    """The llama.cpp decoder of a language model, converted on first use; None if the model is not supported.

    MMCHAT_DECODER=torch in the environment disables it.

    Args:
        model: the language model, with or without a LoRA adapter.
    """
    if os.environ.get("MMCHAT_DECODER") == "torch" or not _is_supported(model):
        return None
    try:
        load_library()
        whole = cache(lambda: base_model(loaded(model)))  # read once, and only if a file is missing
        merges = (False, True) if has_adapter(model) else (False,)
        files = {merge: _converted(model, whole, merge) for merge in merges}
        decoder = LlamaDecoder(model, files)
    except (MmchatError, OSError, MemoryError) as error:
        logger.warning("llama.cpp cannot run this model; decoding with PyTorch, which is slower: %s", error)
        return None
    remove_oldest("llama-*", CACHED_BYTES, [path.parent for path in files.values()])
    logger.info("Decoding with llama.cpp and 8-bit weights")
    return decoder


def _digest(model: nn.Module, merge: bool) -> str:
    """Digest of the config and weights: of the base model's only the first values, since hashing all would be slow."""
    if isinstance(model, StoredLanguageModel):
        return model.digest(merge)
    base = base_model(model)
    digest = hashlib.blake2b(base.config.to_json_string().encode(), digest_size=6)
    for name, weight in base.named_parameters():
        if "lora_" not in name:
            digest.update(weight.detach().flatten()[:64].float().numpy().tobytes())
        elif merge:
            digest.update(weight.detach().float().contiguous().numpy().tobytes())
    for module in base.modules() if merge else ():
        digest.update(repr(getattr(module, "scaling", "")).encode())
    return digest.hexdigest()


def _is_supported(model: nn.Module) -> bool:
    """Whether the base model is one that llama.cpp computes alike, on the CPU, and not quantized."""
    config = model.config
    return (
        config.model_type in ARCHITECTURES
        and all(weight.device.type == "cpu" and weight.is_floating_point() for weight in model.parameters())
        and config.hidden_act == ("gelu_new" if config.model_type == "phi" else "silu")
        and config.rope_parameters["rope_type"] in ("default", "longrope")
        and not getattr(config, "qk_layernorm", False)
    )


def _converted(model: nn.Module, whole: Callable[[], nn.Module], merge: bool) -> Path:
    """The GGUF file of the base model, or of it with the adapter merged.

    Args:
        whole: returns the base model with its weights and adapter layers.
    """

    def convert(folder: Path) -> None:
        writer = language_model_writer(whole(), folder / FILE, short_rope=True)
        writer.add_tokenizer_model(NO_VOCABULARY)
        write_language_model(writer, whole(), "q8_0", merge=merge)

    # "1" is the version of convert: raise it when its output changes
    return convert_once(f"llama-1-{_digest(model, merge)}", convert) / FILE


class LlamaDecoder:
    """A ``Decoder`` on llama.cpp.

    Args:
        model: the language model.
        files: its weights, False → the base model's, True → with the adapter merged, if it has one.
    """

    def __init__(self, model: nn.Module, files: dict[bool, Path]):
        self.model, self.files = model, files
        self._contexts = {merged: _Context(path) for merged, path in files.items()}
        self.batch = Batch(LlamaRows(model))

    def new_cache(self, with_adapter: bool = True) -> LlamaCache:
        return LlamaCache(self._contexts.get(with_adapter, self._contexts[False]), with_adapter)

    def prefill(self, embeddings: torch.Tensor, cache: LlamaCache) -> torch.Tensor:
        context, length = cache.context, cache.length
        context.reserve(length + embeddings.shape[1])
        if length:
            context.sequences.restore(PROMPT, cache.state, length)
        try:
            for chunk in embeddings[0].float().split(CHUNK):  # [tokens, hidden_size]
                tokens = len(chunk)
                logits = context.sequences.extend(
                    chunk.numpy(), range(length, length + tokens), [PROMPT] * tokens, [tokens - 1]
                )
                length += tokens
            cache.state, cache.length = context.sequences.save(PROMPT), length
        finally:
            context.sequences.clear(PROMPT)
        return torch.from_numpy(logits)


class _Context:
    """One file's weights, loaded on first use, and the sequences in progress on them."""

    def __init__(self, path: Path):
        self._path = path
        self.rows: list[_Row] = []

    @cached_property
    def sequences(self) -> Sequences:
        return self._sequences(CAPACITY, COUNT)

    @cached_property
    def _model(self) -> LlamaModel:
        return LlamaModel(self._path)

    def _sequences(self, capacity: int, count: int) -> Sequences:
        return Sequences(self._model, capacity, count, torch.get_num_threads())

    def free_sequences(self, number: int) -> list[int]:
        """The numbers of sequences that no answer has; there must be room for them."""
        taken = {PROMPT, *(row.sequence for row in self.rows)}
        return [sequence for sequence in range(self.sequences.count) if sequence not in taken][:number]

    def reserve(self, tokens: int, rows: int = 0) -> None:
        """Makes room for this many more tokens and rows."""
        old = self.sequences
        capacity, count = sum(row.length for row in self.rows) + tokens, 1 + len(self.rows) + rows
        if capacity <= old.capacity and count <= old.count:
            return
        new = self._sequences(
            old.capacity if capacity <= old.capacity else max(capacity, 2 * old.capacity),
            old.count if count <= old.count else max(count, 2 * old.count),
        )
        moved = list(self.rows)
        for row in moved:
            new.restore(row.sequence, old.save(row.sequence), row.length)
        self.sequences = new
        for row in set(moved) - set(self.rows):  # garbage collection may have closed its answer meanwhile
            new.clear(row.sequence)


@dataclass(eq=False)
class LlamaCache:
    """A ``Cache`` whose keys and values are copied into llama.cpp's context when they are needed."""

    context: _Context
    with_adapter: bool
    length: int = 0  # tokens
    # Never written to, so copies share it.
    state: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint8))

    @property
    def size(self) -> int:
        return self.state.nbytes

    def prefix(self, length: int) -> LlamaCache:
        return LlamaCache(self.context, self.with_adapter, length, self.state)


@dataclass(eq=False)
class _Row:
    context: _Context
    sequence: int
    length: int  # tokens


class LlamaRows:
    """``Rows`` in one batch for the base model and one for the adapter."""

    def __init__(self, model: nn.Module):
        self._model = model

    def add(self, cache: LlamaCache) -> _Row:
        context = cache.context
        context.reserve(cache.length + 1, rows=1)
        row = _Row(context, context.free_sequences(1)[0], cache.length)
        context.sequences.restore(row.sequence, cache.state, cache.length)
        context.rows.append(row)
        return row

    def remove(self, row: _Row) -> None:
        row.context.rows.remove(row)
        row.context.sequences.clear(row.sequence)

    def reorder(self, rows: list[_Row], sources: list[int]) -> None:
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

    @torch.inference_mode()
    def step(self, token_ids: dict[_Row, int]) -> Iterator[tuple[_Row, torch.Tensor]]:
        for context in {row.context for row in token_ids}:
            present = [row for row in token_ids if row.context is context]
            context.reserve(len(present))
            for start in range(0, len(present), CHUNK):
                rows = present[start : start + CHUNK]
                tokens = torch.tensor([token_ids[row] for row in rows])
                embeddings = self._model.get_input_embeddings()(tokens).float().numpy()  # [rows, hidden_size]
                positions, sequences = [row.length for row in rows], [row.sequence for row in rows]
                logits = context.sequences.extend(embeddings, positions, sequences, range(len(rows)))
                for row in rows:
                    row.length += 1
                yield from zip(rows, torch.from_numpy(logits), strict=True)
