"""Decoders: embeddings → logits, with a KV cache. On a CPU, ONNX Runtime is faster than PyTorch.

Each conversation has its own cache. The cache is made for the model with the adapter or without it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from ..models.language_model import switch_adapter
from .onnx_decoder import load_onnx_decoder


class Cache(Protocol):
    """KV cache: keys and values of the tokens so far."""

    @property
    def length(self) -> int:
        """Number of tokens."""

    @property
    def size(self) -> int:
        """Number of bytes."""

    def crop(self, length: int) -> None:
        """Keeps only the first ``length`` tokens."""

    def prefix(self, length: int) -> Cache:
        """A copy of the first ``length`` tokens."""


class Decoder(Protocol):
    """Runs the language model on a prompt, then token by token."""

    model: nn.Module  # the language model, for its token embeddings and config

    def new_cache(self, with_adapter: bool = True) -> Any:
        """An empty cache, with the adapter on or off; a model without an adapter ignores the flag."""

    def prefill(self, embeddings: torch.Tensor, cache: Any) -> torch.Tensor:
        """Appends embeddings, [1, tokens, hidden_size], to the cache → logits of the last, [1, vocabulary]."""

    def step(self, token: torch.Tensor, cache: Any) -> torch.Tensor:
        """Appends one token id, [1, 1], to the cache → logits, [1, vocabulary]."""


def load_decoder(model: nn.Module) -> Decoder:
    """The fastest decoder for a language model on this machine.

    Args:
        model: the language model, with or without a LoRA adapter.
    """
    return load_onnx_decoder(model) or TorchDecoder(model)


class TorchDecoder:
    """A ``Decoder`` on PyTorch, through transformers."""

    def __init__(self, model: nn.Module):
        self.model = model

    def new_cache(self, with_adapter: bool = True) -> TorchCache:
        return TorchCache(self.model.config, with_adapter)

    @torch.inference_mode()
    def prefill(self, embeddings: torch.Tensor, cache: TorchCache) -> torch.Tensor:
        switch_adapter(self.model, cache.with_adapter)
        options = {"past_key_values": cache.layers, "use_cache": True, "logits_to_keep": 1}
        return self.model(inputs_embeds=embeddings, **options).logits[:, -1]

    def step(self, token: torch.Tensor, cache: TorchCache) -> torch.Tensor:
        return self.prefill(self.model.get_input_embeddings()(token), cache)


class TorchCache:
    """A ``Cache`` around transformers' DynamicCache."""

    def __init__(self, config: Any, with_adapter: bool):
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

    def crop(self, length: int) -> None:
        beyond = self.length - length
        if beyond > 0:
            self.layers.crop(-beyond)  # a negative number is cut off the end

    def prefix(self, length: int) -> TorchCache:
        copy = TorchCache(self._config, self.with_adapter)
        for index, layer in enumerate(self.layers.layers):  # [1, heads, tokens, head size]
            copy.layers.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), index)
        return copy
