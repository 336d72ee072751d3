"""Frozen linear layers in 8 bits, forward and backward: on a CPU several times the arithmetic in the same time.

SwitchBack (Wortsman et al. 2023, arXiv 2304.13013) for weights that do not change: what enters a layer and the gradient
that leaves it are rounded to 8 bits, row by row, and multiplied as integers; the sum is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

LEVELS = 127


def quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] → the nearest of 255 levels, int8, and the size of a level in each row, [rows, 1]."""
    scale = values.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LEVELS
    return (values / scale).round().to(torch.int8), scale


class _Multiply(torch.autograd.Function):
    """x Wᵀ, and for the way back g W; W is kept rounded along its rows for the one, along its columns for the other."""

    @staticmethod
    def forward(ctx: Any, x, weight, weight_scale, transposed, transposed_scale):
        ctx.save_for_backward(transposed, transposed_scale)
        return _product(x, weight, weight_scale)

    @staticmethod
    def backward(ctx: Any, gradient):
        return _product(gradient, *ctx.saved_tensors), None, None, None, None


def _product(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    rows, scale = quantize_rows(x.reshape(-1, x.shape[-1]))  # [tokens, inputs]
    total = torch._int_mm(rows, weight.t())  # [tokens, outputs], int32
    return (total * scale * weight_scale).view(*x.shape[:-1], -1)


class Int8Linear(nn.Module):
    """Stands in for a frozen ``nn.Linear``; the weights are kept twice, in a quarter of the room each."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        for name, matrix in (("weight", linear.weight.data), ("transposed", linear.weight.data.t())):
            rounded, scale = quantize_rows(matrix)
            self.register_buffer(name, rounded.contiguous(), persistent=False)
            self.register_buffer(f"{name}_scale", scale.view(1, -1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = _Multiply.apply(x, self.weight, self.weight_scale, self.transposed, self.transposed_scale)
        return product if self.bias is None else product + self.bias


def round_linear_layers(decoder: nn.Module) -> None:
    """Replaces the linear layers of a decoder, those under a LoRA adapter too; the adapter's own stay as they are."""
    for path, module in list(decoder.named_modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and "lora_" not in f"{path}.{name}":
                setattr(module, name, Int8Linear(child))
