"""What reads embeddings and says what may come next: PyTorch, or on a CPU something faster.

A decoder gives caches, for the keys and values of what it has read, and reads on into them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .onnx_decoder import OnnxDecoder, load_onnx_decoder


def load_decoder(model: nn.Module) -> TorchDecoder | OnnxDecoder:
    """The fastest decoder that a language model has on this machine.

    Args:
        model: with or without a LoRA adapter, whose being on or off counts.
    """
    return load_onnx_decoder(model) or TorchDecoder(model)


class TorchDecoder:
    """A language model as transformers runs it."""

    def __init__(self, model: nn.Module):
        self.model = model

    def empty_cache(self) -> TorchCache:
        """For the keys and values of what will be read."""
        return TorchCache(self.model.config)

    @torch.inference_mode()
    def read(self, embeddings: torch.Tensor, cache: TorchCache) -> torch.Tensor:
        """What may come after them: [1, tokens, token_width] → logits, [1, vocabulary]. The cache grows."""
        options = {"past_key_values": cache.layers, "use_cache": True, "logits_to_keep": 1}
        return self.model(inputs_embeds=embeddings, **options).logits[:, -1]


class TorchCache:
    """Keys and values, as transformers keeps them."""

    def __init__(self, config: Any):
        from transformers import DynamicCache

        self._config = config
        self.layers = DynamicCache(config=config)

    @property
    def length(self) -> int:
        """How many tokens have been read."""
        return self.layers.get_seq_length()

    @property
    def size(self) -> int:
        """Bytes of the keys and values."""
        layers = [layer for layer in self.layers.layers if layer.is_initialized]
        return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))

    def crop(self, length: int) -> None:
        """Forgets what comes after the first tokens."""
        beyond = self.length - length
        if beyond > 0:
            self.layers.crop(-beyond)  # takes as many off the end

    def beginning(self, length: int) -> TorchCache:
        """A copy of the first tokens' keys and values."""
        copy = TorchCache(self._config)
        for number, layer in enumerate(self.layers.layers):  # [1, heads, tokens, head width]
            copy.layers.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), number)
        return copy
