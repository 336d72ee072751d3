"""Checks this machine: what mmchat finds, what is missing, and how to fix it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..errors import MmchatError
from ..fetching import is_here
from ..fetching.cache import cache_folder
from ..presets import PRESETS, Preset

REQUIRED = ("gradio", "torch", "transformers", "peft", "faster-whisper", "hibari-tts", "pillow", "safetensors")
OPTIONAL = {
    "accelerate": "training",
    "bitsandbytes": "quantized weights",
    "openai": "a model server",
    "openai-whisper": "Whisper's .pt files",
}
MIN_FREE_DISK = 1.5e9  # bytes to fetch and unpack `smol`


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    text: str
    advice: str = ""  # how to fix it; empty if nothing is wrong
    is_here: bool = True  # False for an optional part that is missing

    @property
    def mark(self) -> str:
        """✗ needs a fix; – optional and missing; ✓ fine."""
        return "✗" if self.advice else "✓" if self.is_here else "–"


def examine() -> Iterator[Finding]:
    """Runs one check after the other. The last one lets the model answer a question."""
    yield _python()
    yield from (_package(name) for name in REQUIRED)
    yield from (_package(name, purpose) for name, purpose in OPTIONAL.items())
    yield _device()
    yield _cache()
    yield from (_preset(preset) for preset in PRESETS.values())
    yield _answer()


def _python() -> Finding:
    text = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", text, "" if sys.version_info >= (3, 11) else "mmchat needs Python 3.11 or newer.")


def _package(name: str, purpose: str = "") -> Finding:
    try:
        return Finding(name, version(name))
    except PackageNotFoundError:
        if purpose:
            return Finding(name, f"not installed; needed only for {purpose}", is_here=False)
        return Finding(name, "not installed", f"pip install {name}")


def _device() -> Finding:
    try:
        from ..device import choose_device, choose_preset

        device = choose_device()
    except ImportError as error:
        return Finding("device", "unknown", f"A package is missing ({error.name}): install mmchat again.")
    preset, reason = choose_preset()
    return Finding("device", f"{device.type}: {device.reason}. The preset auto means {preset.name}: {reason}")


def _cache() -> Finding:
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    advice = "" if free > MIN_FREE_DISK else "Free 1.5 GB of disk space, or set MMCHAT_CACHE to a folder elsewhere."
    return Finding("cache", f"{folder}, {free / 1e9:.0f} GB free", advice)


def _preset(preset: Preset) -> Finding:
    missing = [name for name, source in preset.sources.items() if not is_here(source)]
    text = f"{', '.join(missing)} not here yet; fetched on first use" if missing else "everything is here"
    if "weights" in missing and isinstance(preset.weights, Path):
        text += "; it ships without weights: train or import some"
    return Finding(f"preset {preset.name}", text, is_here=not missing)


def _answer() -> Finding:
    try:
        from ..conversation import Message, SamplingOptions
        from ..engine import load

        engine = load("smol")
        options = SamplingOptions(temperature=0, max_new_tokens=24)
        text = "".join(engine.reply([Message("user", "Say hello in one sentence.")], options))
    except MmchatError as error:
        return Finding("answer", "none", str(error))
    except ImportError as error:
        return Finding("answer", "none", f"A package is missing or broken ({error.name}): install mmchat again.")
    first = text.strip().splitlines()[0] if text.strip() else ""
    return Finding(
        "answer", first or "none", "" if first else "The model gave an empty answer. Delete the cache and try again."
    )
