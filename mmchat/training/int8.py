"""Frozen linear layers in 8 bits, forward and backward: on most CPUs several times the arithmetic in the same time.

SwitchBack (Wortsman et al. 2023, arXiv 2304.13013) for weights that do not change: what enters a layer and the gradient
that leaves it are rounded to 8 bits, row by row, and multiplied as integers; the sum is exact. Processors without VNNI
may lack a fast kernel for it, so that PyTorch takes 26 times as long as in float32, or have one that adds pairs of
products in 16 bits, where large ones do not fit. So both multiplications are tried first.
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

LEVELS = 127
DECISION = "multiplication.json"  # in a run's folder: which multiplication its frozen layers use
MEASURED_SHAPES = 3  # those of a model that cost most
MEASURED_ROWS = 64  # tokens
MEASURED_WIDTH = 512  # at most; wider layers are neither much faster nor much slower
MEASURED_SECONDS = 0.05  # at least, for each product
MEASURED_TIMES = 3  # at least; the first takes long, as kernels are compiled then


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


def is_exact() -> bool:
    """Whether this machine's kernel adds the largest products there are without a loss."""
    rows = torch.full((MEASURED_ROWS, MEASURED_WIDTH), LEVELS, dtype=torch.int8)
    return bool((torch._int_mm(rows, rows.t()) == MEASURED_WIDTH * LEVELS**2).all())


@dataclass(frozen=True)
class Speeds:
    """Billions of additions and multiplications per second and core in a layer, rounding included."""

    int8: float
    float32: float

    def __str__(self) -> str:
        return f"int8: {self.int8:,.0f} GFLOP/s, float32: {self.float32:,.0f} GFLOP/s a core"


@torch.no_grad()
def measure_speeds(decoder: nn.Module) -> Speeds:
    """How fast this machine computes the layers that would be rounded, measured in less than a second."""
    shapes = Counter(tuple(linear.weight.shape) for *_, linear in _frozen_linear_layers(decoder))
    costliest = sorted(shapes, key=lambda shape: shapes[shape] * shape[0] * shape[1], reverse=True)[:MEASURED_SHAPES]
    operations, seconds = 0, {"int8": 0.0, "float32": 0.0}
    for shape in costliest:
        outputs, inputs = (min(size, MEASURED_WIDTH) for size in shape)
        x, weight = torch.ones(MEASURED_ROWS, inputs), torch.ones(outputs, inputs)
        rounded, scale = quantize_rows(weight)
        operations += shapes[shape] * 2 * MEASURED_ROWS * outputs * inputs
        seconds["int8"] += shapes[shape] * _fastest(_product, x, rounded, scale.view(1, -1))
        seconds["float32"] += shapes[shape] * _fastest(nn.functional.linear, x, weight)
    return Speeds(**{name: operations / duration / 1e9 for name, duration in seconds.items()})


def _fastest(product: Callable, *factors: torch.Tensor) -> float:
    """Seconds that a product takes one core when nothing comes between; several cores would wait for each other."""
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
    """Rounds a decoder's linear layers if that is exact and faster here; otherwise they stay in full precision.

    The decision is kept in the run's folder, so that a resumed run computes what it would have computed without the
    interruption, on another machine, too, even if the other multiplication is faster there. Checkpoints without a
    decision come from a version that always rounded.

    Args:
        run: the folder that the training run writes.

    Raises:
        BadInput: the decision in it cannot be read, or is for 8 bits, which this machine does not multiply exactly.
    """
    state, decision = PartialState(cpu=True), [None]
    if state.is_main_process:  # it decides for all: processes that multiply differently would not learn the same
        decision = [_kept_decision(run) or _decide(decoder, run)]
    broadcast_object_list(decision)
    if decision == ["int8"]:
        round_linear_layers(decoder)


def _kept_decision(run: Path) -> str | None:
    path = run / DECISION
    if path.exists():
        try:
            kept = {"int8": "int8", "float32": "float32"}[json.loads(path.read_text())["multiplication"]]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f'{path} has to say {{"multiplication": "int8"}} or "float32".') from error
    elif any(run.glob("checkpoint-*")):
        kept = "int8"
    else:
        return None
    if kept == "int8" and not is_exact():
        raise BadInput(
            "This run began in 8 bits, which this processor does not multiply exactly: resume it where it began, or "
            "with --quantization none."
        )
    logger.info("Frozen layers multiply in %s, as this run began (remove %s to begin a run anew)", kept, DECISION)
    return kept


def _decide(decoder: nn.Module, run: Path) -> str:
    speeds = measure_speeds(decoder)
    choice, reason = ("int8" if speeds.int8 > speeds.float32 else "float32"), "which is faster here"
    if choice == "int8" and not is_exact():
        choice, reason = "float32", "because this processor's sums of 8-bit products are not exact"
    logger.info("Frozen layers multiply in %s, %s (%s)", choice, reason, speeds)
    run.mkdir(parents=True, exist_ok=True)
    (run / DECISION).write_text(json.dumps({"multiplication": choice, "gflops": asdict(speeds)}))
    return choice


def round_linear_layers(decoder: nn.Module) -> None:
    """Replaces the linear layers of a decoder, those under a LoRA adapter too; the adapter's own stay as they are."""
    for parent, name, linear in list(_frozen_linear_layers(decoder)):
        setattr(parent, name, Int8Linear(linear))


def _frozen_linear_layers(decoder: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Each with the module it is in, and its name there."""
    for path, module in decoder.named_modules():
        for name, child in module.named_children():
            if type(child) is nn.Linear and "lora_" not in f"{path}.{name}":
                yield module, name, child
