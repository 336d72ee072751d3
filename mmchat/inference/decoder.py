"""Embeddings in, logits out: PyTorch, or on a CPU something faster.

A decoder makes caches for keys and values. A cache belongs to one conversation, and says whether the adapter takes part
in what is computed for it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from ..models.language_model import switch_adapter
from .onnx_decoder import load_onnx_decoder


class Cache(Protocol):
    """Keys and values of the tokens that a decoder has read."""

    @property
    def length(self) -> int:
        """In tokens."""

    @property
    def size(self) -> int:
        """In bytes."""

    def crop(self, length: int) -> None:
        """Forgets what comes after the first tokens."""

    def prefix(self, length: int) -> Cache:
        """A copy of the first tokens' keys and values."""


class Decoder(Protocol):
    """What reads a prompt and writes token by token."""

    model: nn.Module  # the language model, for its embeddings and its configuration

    def new_cache(self, with_adapter: bool = True) -> Any:
        """An empty cache, for a conversation with the adapter or without; a model that has none ignores it."""

    def prefill(self, embeddings: torch.Tensor, cache: Any) -> torch.Tensor:
        """Reads embeddings, [1, tokens, hidden_size], behind what the cache holds → logits, [1, vocabulary]."""

    def step(self, token: torch.Tensor, cache: Any) -> torch.Tensor:
        """Reads one token's id, [1, 1] → logits, [1, vocabulary]."""


def load_decoder(model: nn.Module) -> Decoder:
    """The fastest decoder that a language model has on this machine.

    Args:
        model: with or without a LoRA adapter.
    """
    return load_onnx_decoder(model) or TorchDecoder(model)


class TorchDecoder:
    """A language model as transformers runs it."""

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
    """Keys and values, as transformers keeps them."""

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
            self.layers.crop(-beyond)  # takes as many off the end

    def prefix(self, length: int) -> TorchCache:
        copy = TorchCache(self._config, self.with_adapter)
        for index, layer in enumerate(self.layers.layers):  # [1, heads, tokens, head size]
            copy.layers.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), index)
        return copy
