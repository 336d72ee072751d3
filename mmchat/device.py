"""Chooses the device, the number format and the preset, each with a reason that is logged."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import BadInput
from .fetching.hub import can_fetch
from .fetching.sources import HubRepository
from .presets import PHI_3_5, SMOL, Preset

if TYPE_CHECKING:  # torch takes seconds to import, and the page's start does not wait for it
    import torch

logger = logging.getLogger(__name__)

QUANTIZATIONS = ("auto", "none", "8bit", "4bit", "4bit-double")
BYTES_PER_4BIT_WEIGHT = 0.56  # half a byte, plus its share of the scale of a block of 64
HEADROOM = 2e9  # bytes besides the weights: activations, KV cache, CLIP and Whisper


@dataclass(frozen=True)
class Device:
    """A device and the dtype of the language model on it."""

    type: str  # "cpu", "cuda" or "mps", as torch names it
    dtype: torch.dtype
    reason: str


def on_zero_gpu() -> bool:
    """Whether this is a Space on ZeroGPU, which lends its GPU only while a question is answered."""
    return bool(os.environ.get("SPACES_ZERO_GPU"))


def choose_device() -> Device:
    """The fastest device of this machine."""
    import torch

    if on_zero_gpu():
        return Device("cuda", torch.bfloat16, "ZeroGPU lends a GPU for each answer")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Device("cuda", torch.bfloat16, f"{name} computes in bfloat16")
        return Device("cuda", torch.float16, f"{name} has no bfloat16")
    if torch.backends.mps.is_available():
        return Device("mps", torch.float32, "Apple's GPU; every layer is safe in float32")
    return Device("cpu", torch.float32, "no GPU was found; on a CPU float32 is faster than 16 bits")


@dataclass(frozen=True)
class Quantization:
    """How the language model's weights are stored (one of QUANTIZATIONS except "auto"), and why."""

    kind: str
    reason: str


def choose_quantization(requested: str, device: Device, parameters: int) -> Quantization:
    """Resolves "auto": full precision if it fits in GPU memory, else 4 bits. Other choices are kept.

    Args:
        requested: one of QUANTIZATIONS.
        parameters: parameter count of the language model.

    Raises:
        BadInput: there is no such quantization.
    """
    import torch

    if requested not in QUANTIZATIONS:
        raise BadInput(f"The quantization must be one of {', '.join(QUANTIZATIONS)}, not '{requested}'.")
    if requested != "auto":
        return Quantization(requested, "as requested")
    if device.type != "cuda":
        return Quantization("none", "without a GPU full precision is fastest")
    if on_zero_gpu():
        return Quantization("none", "16 bits fit on ZeroGPU")
    free, _ = torch.cuda.mem_get_info()
    needed = parameters * device.dtype.itemsize + HEADROOM
    reason = f"{free / 1e9:.0f} GB of GPU memory are free, and 16 bits need {needed / 1e9:.0f} GB"
    return Quantization("none" if free >= needed else "4bit", reason)


def choose_preset() -> tuple[Preset, str]:
    """Resolves the preset "auto", with the reason: Phi-3.5 if it fits on a GPU and is available, else smol."""
    import torch

    device, model = choose_device(), PHI_3_5.language_model
    if device.type != "cuda":
        return SMOL, "there is no GPU for a larger model"
    if not on_zero_gpu():
        free, _ = torch.cuda.mem_get_info()
        needed = model.parameters * BYTES_PER_4BIT_WEIGHT + HEADROOM
        if free < needed:
            return SMOL, f"Phi-3.5 needs {needed / 1e9:.0f} GB of GPU memory, and {free / 1e9:.0f} are free"
    if isinstance(model.source, HubRepository) and not can_fetch(model.source):
        return SMOL, "Phi-3.5 is not on this machine, and the Hugging Face Hub cannot be reached"
    return PHI_3_5, f"it fits on this GPU ({device.reason})"


def choose_attention() -> str:
    """The attention kernel, as transformers names it: MMCHAT_ATTENTION if it is installed, else sdpa."""
    from transformers.utils import is_flash_attn_2_available

    requested = os.environ.get("MMCHAT_ATTENTION", "sdpa")
    if requested == "flash_attention_2" and not is_flash_attn_2_available():
        logger.warning("flash-attn is not installed or finds no GPU; using PyTorch's attention (sdpa) instead")
        return "sdpa"
    return requested
