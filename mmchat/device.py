"""Where and how precisely to compute: decided once, with a reason that is logged."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import BadInput
from .fetching.hub import can_fetch
from .presets import PHI_3_5, SMOL, Preset

if TYPE_CHECKING:  # torch takes seconds to import, and the page's start does not wait for it
    import torch

logger = logging.getLogger(__name__)

QUANTIZATIONS = ("auto", "none", "8bit", "4bit", "4bit-double")
BYTES_IN_4_BITS = 0.56  # of a weight: half a byte, and its share of a scale for 64
HEADROOM = 2e9  # bytes beside the weights: activations, the cache of a conversation, CLIP and Whisper


@dataclass(frozen=True)
class Device:
    """A place to compute and the number format of the language model there."""

    type: str  # "cpu", "cuda" or "mps", as torch names it
    dtype: torch.dtype
    reason: str


def on_zero_gpu() -> bool:
    """Whether this is a Space on ZeroGPU, where a GPU can be used, but not looked at, outside an answer."""
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
        return Device("mps", torch.float32, "Apple's GPU; 32 bits are safe for every layer there")
    return Device("cpu", torch.float32, "no GPU was found; on a CPU 32 bits are faster than 16")


@dataclass(frozen=True)
class Quantization:
    """How the weights of the language model are kept: a name of QUANTIZATIONS but "auto", and why."""

    kind: str
    reason: str


def choose_quantization(asked: str, device: Device, parameters: int) -> Quantization:
    """What was asked for; of "auto", full precision where it has room, else 4 bits.

    Args:
        parameters: of the language model.
    """
    import torch

    if asked not in QUANTIZATIONS:
        raise BadInput(f"The quantization is one of {', '.join(QUANTIZATIONS)}, not '{asked}'.")
    if asked != "auto":
        return Quantization(asked, "as you asked")
    if device.type != "cuda":
        return Quantization("none", "without a GPU full precision is fastest")
    if on_zero_gpu():
        return Quantization("none", "ZeroGPU has room for 16 bits")
    free, _ = torch.cuda.mem_get_info()
    needed = parameters * device.dtype.itemsize + HEADROOM
    room = f"{free / 1e9:.0f} GB of GPU memory are free, {needed / 1e9:.0f} needed in 16 bits"
    return Quantization("none" if free >= needed else "4bit", room)


def choose_preset() -> tuple[Preset, str]:
    """What "auto" means here, and why: Phi-3.5 where a GPU has room for it and its weights can be had, else smol."""
    import torch

    device, model = choose_device(), PHI_3_5.language_model
    if device.type != "cuda":
        return SMOL, "there is no GPU for a larger model"
    if not on_zero_gpu():
        free, _ = torch.cuda.mem_get_info()
        needed = model.parameters * BYTES_IN_4_BITS + HEADROOM
        if free < needed:
            return SMOL, f"Phi-3.5 needs {needed / 1e9:.0f} GB of GPU memory, and {free / 1e9:.0f} are free"
    if not can_fetch(model.source):
        return SMOL, "Phi-3.5 is not on this machine, and the Hugging Face Hub cannot be reached"
    return PHI_3_5, f"this GPU has room for it ({device.reason})"


def choose_attention() -> str:
    """The attention kernel, as transformers names it: sdpa, or what MMCHAT_ATTENTION says and is installed."""
    from transformers.utils import is_flash_attn_2_available

    asked = os.environ.get("MMCHAT_ATTENTION", "sdpa")
    if asked == "flash_attention_2" and not is_flash_attn_2_available():
        logger.warning("flash-attn is not installed or has no GPU here; attention is computed by PyTorch (sdpa)")
        return "sdpa"
    return asked
