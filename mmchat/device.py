"""Chooses the device, the number format and the preset, each with a reason that is logged."""

from __future__ import annotations

import ctypes
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .errors import BadInput
from .fetching import can_fetch
from .fetching.sources import HubRepository
from .presets import LLAVA_PHI_3, PHI_3_5, SMOL, LanguageModelPreset, Preset

if TYPE_CHECKING:  # torch takes seconds to import, and the page's start does not wait for it
    import torch

logger = logging.getLogger(__name__)

QUANTIZATIONS = ("auto", "none", "8bit", "4bit", "4bit-double")
BYTES_PER_4BIT_WEIGHT = 0.56  # half a byte, plus its share of the scale of a block of 64
HEADROOM = 2e9  # bytes besides the weights: activations, KV cache, CLIP and Whisper
LLAVA_HEADROOM = 1.2e9  # more, for CLIP ViT-L in 32 bits
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt, as glibc's malloc.h numbers them
FOR_4BIT = ("accelerate", "bitsandbytes")


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


def headroom_of(model: LanguageModelPreset) -> float:
    """Bytes of GPU memory that a preset needs besides the weights of its language model."""
    return HEADROOM + (LLAVA_HEADROOM if model.is_llava else 0)


def choose_quantization(requested: str, device: Device, parameters: int, headroom: float = HEADROOM) -> Quantization:
    """Resolves "auto": full precision if it fits in GPU memory, else 4 bits. Other choices are kept.

    Args:
        requested: one of QUANTIZATIONS.
        parameters: parameter count of the language model.
        headroom: bytes needed besides its weights.

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
    needed = parameters * device.dtype.itemsize + headroom
    reason = f"{free / 1e9:.0f} GB of GPU memory are free, and 16 bits need {needed / 1e9:.0f} GB"
    return Quantization("none" if free >= needed else "4bit", reason)


def choose_preset() -> tuple[Preset, str]:
    """Resolves the preset "auto", with the reason: the best one that will load on a GPU, else smol.

    A preset loads if its weights fit, in 4 bits if need be and if the packages for these are installed, and if every
    part of it is on this machine or on the Hub.
    """
    device = choose_device()
    if device.type != "cuda":
        return SMOL, "there is no GPU for a larger model"
    reasons = []
    for preset in (LLAVA_PHI_3, PHI_3_5):
        trouble = _trouble(preset, device)
        if not trouble:
            return preset, f"it fits on this GPU ({device.reason})"
        reasons.append(trouble)
    return SMOL, "; ".join(dict.fromkeys(reasons))


def _trouble(preset: Preset, device: Device) -> str:
    """Why a preset would not load on this GPU; empty if it will."""
    import torch

    model = preset.language_model
    if not on_zero_gpu():
        free, _ = torch.cuda.mem_get_info()
        headroom = headroom_of(model)
        needed = model.parameters * BYTES_PER_4BIT_WEIGHT + headroom
        if free < needed:
            return (
                f"{preset.name} needs {needed / 1e9:.1f} GB of GPU memory in 4 bits, and {free / 1e9:.1f} GB are free"
            )
        is_tight = free < model.parameters * device.dtype.itemsize + headroom
        missing = [name for name in FOR_4BIT if find_spec(name) is None]
        if is_tight and missing:
            return f"{preset.name} fits in 4 bits only, which needs {' and '.join(missing)}: pip install 'mmchat[gpu]'"
    for source in dict.fromkeys(preset.sources.values()):
        if isinstance(source, HubRepository) and not can_fetch(source):
            return (
                f"{source.name}, which {preset.name} needs, is not on this machine and the Hugging Face Hub gave none"
            )
    return ""


def keep_less_memory() -> None:
    """Makes glibc return freed memory to the system soon; by default it keeps up to 64 MB for the next request."""
    _set_malloc(trim_threshold=2**16, mmap_threshold=2**20)


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next request, instead of getting new pages, full of zeros, each time.

    Every training step allocates the same large tensors, so this saves an eighth of its time with compiled layers.
    """
    _set_malloc(trim_threshold=2**31 - 1, mmap_threshold=2**30)


def _set_malloc(trim_threshold: int, mmap_threshold: int) -> None:
    with suppress(AttributeError, OSError, TypeError):  # another C library has no mallopt
        for parameter, size in ((M_TRIM_THRESHOLD, trim_threshold), (M_MMAP_THRESHOLD, mmap_threshold)):
            ctypes.CDLL(None).mallopt(parameter, size)


def release_memory() -> None:
    """Makes glibc return to the system what was freed, such as what loading needed for a moment."""
    with suppress(AttributeError, OSError, TypeError):  # another C library has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def choose_attention() -> str:
    """The attention kernel, as transformers names it: MMCHAT_ATTENTION if it is installed, else sdpa."""
    from transformers.utils import is_flash_attn_2_available

    requested = os.environ.get("MMCHAT_ATTENTION", "sdpa")
    if requested == "flash_attention_2" and not is_flash_attn_2_available():
        logger.warning("flash-attn is not installed or finds no GPU; using PyTorch's attention (sdpa) instead")
        return "sdpa"
    return requested
