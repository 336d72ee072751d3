"""Decoders: embeddings → logits, with a KV cache. On a CPU, llama.cpp is faster than PyTorch.

A prompt is prefilled alone; answers are generated in one batch. Each conversation has its own cache, made for the model
with or without the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..models.language_model import switch_adapter
from ..models.stored_language_model import loaded
from .batch import Batch
from .llama_decoder import load_llama_decoder
from .openvino_decoder import load_openvino_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Cache(Protocol):
    """KV cache: keys and values of the tokens so far."""

    @property
    def with_adapter(self) -> bool:
        """Whether they are the adapter's, which differ from the base model's."""

    @property
    def length(self) -> int:
        """Number of tokens."""

    @property
    def size(self) -> int:
        """Number of bytes."""

    def prefix(self, length: int) -> Cache:
        """A copy of the first ``length`` tokens."""


class Decoder(Protocol):
    """Runs the language model on prompts one by one, then on the answers to all of them token by token."""

    model: nn.Module  # the language model, for its token embeddings and config
    batch: Batch  # the answers in progress

    def new_cache(self, with_adapter: bool = True) -> Cache:
        """An empty cache, with the adapter on or off; a model without an adapter ignores the flag."""

    def prefill(self, embeddings: torch.Tensor, cache: Any) -> torch.Tensor:
        """Appends embeddings, [1, tokens, hidden_size], to the cache → logits of the last, [1, vocabulary]."""


def load_decoder(model: nn.Module) -> Decoder:
    """The fastest decoder for a language model on this machine, or the one that MMCHAT_DECODER names.

    Args:
        model: the language model, with or without a LoRA adapter; a stored one is loaded if PyTorch must compute it.
    """
    return load_openvino_decoder(model) or load_llama_decoder(model) or TorchDecoder(loaded(model))


class TorchDecoder:
    """A ``Decoder`` on PyTorch, through transformers."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.batch = Batch(TorchRows(model))

    def new_cache(self, with_adapter: bool = True) -> TorchCache:
        return TorchCache(self.model.config, with_adapter)

    @torch.inference_mode()
    def prefill(self, embeddings: torch.Tensor, cache: TorchCache) -> torch.Tensor:
        switch_adapter(self.model, cache.with_adapter)
        options = {"past_key_values": cache.layers, "use_cache": True, "logits_to_keep": 1}
        return self.model(inputs_embeds=embeddings, **options).logits[:, -1]


class TorchCache:
    """A ``Cache`` around transformers' DynamicCache."""

    def __init__(self, config: PreTrainedConfig, with_adapter: bool):
        from transformers import DynamicCache

        self._config, self.with_adapter = config, with_adapter
        self.layers = DynamicCache(config=config)

    @property
    def length(self) -> int:
        return self.layers.get_seq_length()

    @property
    def size(self) -> int:
        layers = [layer for layer in self.layers.layers if layer.is_initialized]
        return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))

    def prefix(self, length: int) -> TorchCache:
        copy = TorchCache(self._config, self.with_adapter)
        for index, layer in enumerate(self.layers.layers):  # [1, heads, tokens, head size]
            copy.layers.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), index)
        return copy


class TorchRows:
    """``Rows`` in two padded batches, with and without the adapter, which is on or off for the whole model."""

    def __init__(self, model: nn.Module):
        self._batches = {with_adapter: _PaddedRows(model, with_adapter) for with_adapter in (False, True)}

    def add(self, cache: TorchCache) -> _Row:
        return self._batches[cache.with_adapter].add(cache)

    def remove(self, row: _Row) -> None:
        self._batches[row.with_adapter].remove(row)

    def reorder(self, rows: list[_Row], sources: list[int]) -> None:
        self._batches[rows[0].with_adapter].reorder(rows, sources)

    def step(self, token_ids: dict[_Row, int]) -> Iterator[tuple[_Row, torch.Tensor]]:
        for with_adapter in {row.with_adapter for row in token_ids}:
            yield from self._batches[with_adapter].step(token_ids)


@dataclass(eq=False)
class _Row:
    with_adapter: bool
    length: int  # tokens


class _PaddedRows:
    """Rows of one state of the adapter, padded on the left, so the next token of each has the same column."""

    def __init__(self, model: nn.Module, with_adapter: bool):
        self._model, self._with_adapter = model, with_adapter
        self._rows: list[_Row] = []
        self._is_token = torch.zeros(0, 0, dtype=torch.long)  # [rows, columns]
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys and values, [rows, heads, columns, head size]

    def add(self, cache: TorchCache) -> _Row:
        added = [(layer.keys, layer.values) for layer in cache.layers.layers]
        is_token = torch.ones(1, cache.length, dtype=torch.long, device=added[0][0].device)
        if self._rows:
            columns = max(cache.length, self._is_token.shape[1])
            is_token = torch.cat([_left_pad(mask, 1, columns) for mask in (self._is_token, is_token)])
            added = [
                (_concatenate(keys, other_keys, columns), _concatenate(values, other_values, columns))
                for (keys, values), (other_keys, other_values) in zip(self._layers, added, strict=True)
            ]
        self._is_token, self._layers = is_token, added
        self._rows.append(_Row(self._with_adapter, cache.length))
        return self._rows[-1]

    def remove(self, row: _Row) -> None:
        kept = [index for index, other in enumerate(self._rows) if other is not row]
        self._rows = [self._rows[index] for index in kept]
        if not kept:
            self._layers = []
            return
        first = int(self._is_token[kept].any(dim=0).int().argmax())  # column
        self._is_token = self._is_token[kept, first:]
        self._layers = [(keys[kept, :, first:], values[kept, :, first:]) for keys, values in self._layers]

    def reorder(self, rows: list[_Row], sources: list[int]) -> None:
        index = list(range(len(self._rows)))
        for row, source in zip(rows, sources, strict=True):
            index[self._rows.index(row)] = self._rows.index(rows[source])
        self._is_token = self._is_token[index]
        self._layers = [(keys[index], values[index]) for keys, values in self._layers]

    @torch.inference_mode()
    def step(self, token_ids: dict[_Row, int]) -> list[tuple[_Row, torch.Tensor]]:
        """As in ``Rows``; rows without a token get one that no later token attends to. An error changes nothing."""
        from transformers import DynamicCache

        switch_adapter(self._model, self._with_adapter)
        device = self._is_token.device
        has_token = torch.tensor([[int(row in token_ids)] for row in self._rows], device=device)  # [rows, 1]
        is_token = torch.cat([self._is_token, has_token], dim=1)
        cache = DynamicCache(self._layers)
        logits = self._model(
            input_ids=torch.tensor([[token_ids.get(row, 0)] for row in self._rows], device=device),
            position_ids=torch.tensor([[row.length] for row in self._rows], device=device),
            attention_mask=is_token,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]  # [rows, vocabulary]
        self._is_token, self._layers = is_token, [(layer.keys, layer.values) for layer in cache.layers]
        for row in self._rows:
            row.length += row in token_ids
        return [(row, logits[index]) for index, row in enumerate(self._rows) if row in token_ids]


def _concatenate(rows: torch.Tensor, added: torch.Tensor, columns: int) -> torch.Tensor:
    """Concatenates two batches of keys or values, left-padded to ``columns``: [rows, heads, columns, head size]."""
    return torch.cat([_left_pad(rows, 2, columns), _left_pad(added, 2, columns)])


def _left_pad(tensor: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """Left-pads with zeros to ``length`` along ``dim``."""
    shape = list(tensor.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)
