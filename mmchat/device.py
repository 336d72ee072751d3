"""Where and how precisely to compute: decided once, with a reason that is logged."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """A place to compute and the number format of the language model there."""

    type: str  # "cpu", "cuda" or "mps", as torch names it
    dtype: torch.dtype
    reason: str


def choose_device() -> Device:
    """The fastest device of this machine."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Device("cuda", torch.bfloat16, f"{name} computes in bfloat16")
        return Device("cuda", torch.float16, f"{name} has no bfloat16")
    if torch.backends.mps.is_available():
        return Device("mps", torch.float32, "Apple's GPU; 32 bits are safe for every layer there")
    return Device("cpu", torch.float32, "no GPU was found; on a CPU 32 bits are faster than 16")
