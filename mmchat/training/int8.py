"""Int8 matrix multiplication for frozen linear layers, forward and backward: several times faster on most CPUs.

This is SwitchBack (Wortsman et al. 2023, arXiv 2304.13013) for frozen weights. Inputs and output gradients are
quantized row by row to int8 and multiplied as integers, with exact int32 sums. Processors without VNNI may lack a fast
kernel, and PyTorch then takes 26 times as long as in float32. Others have a kernel that adds pairs of products in 16
bits, where large ones overflow. So speed and exactness are tested before int8 is used.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from ..errors import BadInput

logger = logging.getLogger(__name__)

MAX_CODE = 127
DECISION_FILE = "multiplication.json"  # in a run's folder: the number format in which its frozen layers multiply
MEASURED_SHAPES = 3  # the costliest layer shapes of a model
MEASURED_ROWS = 64  # tokens
MEASURED_WIDTH = 512  # upper limit; the speed of wider layers is about the same
MEASURED_SECONDS = 0.05  # minimum for each product
MEASURED_TIMES = 3  # minimum; the first call is slow because it compiles kernels


def quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes each row symmetrically: [rows, columns] → int8 codes, [rows, columns], and scales, [rows, 1]."""
    scale = values.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / MAX_CODE
    return (values / scale).round().to(torch.int8), scale


class _Multiply(torch.autograd.Function):
    """Computes x Wᵀ forward and g W backward. W is quantized by rows for the one and by columns for the other."""

    @staticmethod
    def forward(ctx: Any, x, weight, weight_scale, transposed, transposed_scale):
        ctx.save_for_backward(transposed, transposed_scale)
        return _product(x, weight, weight_scale)

    @staticmethod
    def backward(ctx: Any, gradient):
        return _product(gradient, *ctx.saved_tensors), None, None, None, None


def _product(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    codes, scale = quantize_rows(x.reshape(-1, x.shape[-1]))  # [tokens, inputs], [tokens, 1]
    total = torch._int_mm(codes, weight.t())  # [tokens, outputs], int32
    return (total * scale * weight_scale).view(*x.shape[:-1], -1)


class Int8Linear(nn.Module):
    """Replaces a frozen ``nn.Linear``. It holds two int8 copies of the weight, each a quarter of the float32 size."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        for name, matrix in (("weight", linear.weight.data), ("transposed", linear.weight.data.t())):
            codes, scale = quantize_rows(matrix)
            self.register_buffer(name, codes.contiguous(), persistent=False)
            self.register_buffer(f"{name}_scale", scale.view(1, -1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = _Multiply.apply(x, self.weight, self.weight_scale, self.transposed, self.transposed_scale)
        return product if self.bias is None else product + self.bias


def is_exact() -> bool:
    """Whether this machine's kernel adds the largest possible products without overflow."""
    codes = torch.full((MEASURED_ROWS, MEASURED_WIDTH), MAX_CODE, dtype=torch.int8)
    return bool((torch._int_mm(codes, codes.t()) == MEASURED_WIDTH * MAX_CODE**2).all())


@dataclass(frozen=True)
class Speeds:
    """Speed of a layer in GFLOP/s per core, quantization included."""

    int8: float
    float32: float

    def __str__(self) -> str:
        return f"int8: {self.int8:,.0f} GFLOP/s, float32: {self.float32:,.0f} GFLOP/s per core"


@torch.no_grad()
def measure_speeds(decoder: nn.Module) -> Speeds:
    """Measures, in less than a second, how fast this machine computes the layers that would be quantized."""
    shapes = Counter(tuple(linear.weight.shape) for *_, linear in _frozen_linear_layers(decoder))
    costliest = sorted(shapes, key=lambda shape: shapes[shape] * shape[0] * shape[1], reverse=True)[:MEASURED_SHAPES]
    operations, seconds = 0, {"int8": 0.0, "float32": 0.0}
    for shape in costliest:
        outputs, inputs = (min(size, MEASURED_WIDTH) for size in shape)
        x, weight = torch.ones(MEASURED_ROWS, inputs), torch.ones(outputs, inputs)
        codes, scale = quantize_rows(weight)
        operations += shapes[shape] * 2 * MEASURED_ROWS * outputs * inputs
        seconds["int8"] += shapes[shape] * _fastest(_product, x, codes, scale.view(1, -1))
        seconds["float32"] += shapes[shape] * _fastest(nn.functional.linear, x, weight)
    return Speeds(**{name: operations / duration / 1e9 for name, duration in seconds.items()})


def _fastest(product: Callable, *factors: torch.Tensor) -> float:
    """Seconds for a product on one core, the best of several runs; more cores would wait for each other."""
    times: list[float] = []
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        while len(times) < MEASURED_TIMES or sum(times) < MEASURED_SECONDS:
            start = time.perf_counter()
            product(*factors)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(cores)
    return min(times)


def use_faster_multiplication(decoder: nn.Module, run: Path) -> None:
    """Quantizes a decoder's linear layers to int8 if that is exact and faster here; otherwise leaves them as they are.

    The decision is stored in the run's folder. A resumed run follows it even on a machine where the other format is
    faster, and so computes what it would have computed without the interruption. Checkpoints without a stored decision
    come from a version that always used int8.

    Args:
        run: the output folder of the training run.

    Raises:
        BadInput: the stored decision is unreadable, or it says int8 and this machine's int8 products are not exact.
    """
    state, decision = PartialState(cpu=True), [None]
    if state.is_main_process:  # decides for every process, so that all compute the same gradients
        decision = [_stored_decision(run) or _decide(decoder, run)]
    broadcast_object_list(decision)
    if decision == ["int8"]:
        quantize_linear_layers(decoder)


def _stored_decision(run: Path) -> str | None:
    path = run / DECISION_FILE
    if path.exists():
        try:
            stored = {"int8": "int8", "float32": "float32"}[json.loads(path.read_text())["multiplication"]]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f'{path} must contain {{"multiplication": "int8"}} or "float32".') from error
    elif any(run.glob("checkpoint-*")):
        stored = "int8"
    else:
        return None
    if stored == "int8" and not is_exact():
        raise BadInput(
            "This run started in int8, which this processor does not multiply exactly: resume it on the machine where "
            "it started, or with --quantization none."
        )
    logger.info("Frozen layers multiply in %s, as this run started (delete %s to choose again)", stored, DECISION_FILE)
    return stored


def _decide(decoder: nn.Module, run: Path) -> str:
    speeds = measure_speeds(decoder)
    choice, reason = ("int8" if speeds.int8 > speeds.float32 else "float32"), "which is faster here"
    if choice == "int8" and not is_exact():
        choice, reason = "float32", "because this processor's int8 sums are not exact"
    logger.info("Frozen layers multiply in %s, %s (%s)", choice, reason, speeds)
    run.mkdir(parents=True, exist_ok=True)
    (run / DECISION_FILE).write_text(json.dumps({"multiplication": choice, "gflops": asdict(speeds)}))
    return choice


def quantize_linear_layers(decoder: nn.Module) -> None:
    """Replaces a decoder's linear layers by ``Int8Linear``, also under LoRA; the adapter's own layers stay."""
    for parent, name, linear in list(_frozen_linear_layers(decoder)):
        setattr(parent, name, Int8Linear(linear))


def _frozen_linear_layers(decoder: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yields (parent module, name in it, layer)."""
    for path, module in decoder.named_modules():
        for name, child in module.named_children():
            if type(child) is nn.Linear and "lora_" not in f"{path}.{name}":
                yield module, name, child
