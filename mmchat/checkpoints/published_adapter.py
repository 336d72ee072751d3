"""The adapter of a published checkpoint.

It is a PEFT folder, or ``lora_weights.pt`` with ``….lora_A.weight``, ``….lora_B.weight`` and ``….scaling`` for each
layer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import WeightsError
from ..models.language_model import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    add_adapter,
    attach_adapter,
    set_adapter_weights,
)
from ..presets import LanguageModelPreset
from .published_files import ImportReport, read_tensors

LORA_FILE = "lora_weights.pt"
RESIZED = re.compile(r"\.(embed_tokens|lm_head)\.(weight|bias)$")  # PEFT saves them where a token was added


def find_adapter(folder: Path) -> Path:
    """The file of a published folder that its adapter is read from: ``lora_weights.pt``, or PEFT's config.

    Raises:
        WeightsError: there is none.
    """
    found = [path for path in (folder / LORA_FILE, *sorted(folder.rglob(ADAPTER_CONFIG))) if path.is_file()]
    if not found:
        raise WeightsError(f"'{folder.name}' holds no adapter: neither {ADAPTER_CONFIG} nor {LORA_FILE}.")
    return found[0]


def import_adapter(
    folder: Path, language_model: nn.Module, base: LanguageModelPreset, report: ImportReport
) -> nn.Module:
    """The language model with the adapter of a published folder: PEFT's own, or ``lora_weights.pt``."""
    found = find_adapter(folder)
    if found.name == LORA_FILE:
        return _import_lora(read_tensors(found), language_model, base.name, report)
    adapter = found.parent
    weights = adapter / ADAPTER_WEIGHTS
    tensors = read_tensors(weights if weights.is_file() else weights.with_suffix(".bin"))
    adapted = attach_adapter(language_model, adapter)
    config = adapted.peft_config["default"]
    for name in [name for name in tensors if RESIZED.search(name) and not config.modules_to_save]:
        report.ignored[name] = "frozen in training, so the base model has it, too"
        del tensors[name]
    trained_on = str(config.base_model_name_or_path or "")
    if trained_on.rpartition("/")[2].lower() not in ("", base.source.name.rpartition("/")[2].lower()):
        report.notes.append(f"The adapter was trained on {trained_on}, not on {base.name}.")
    set_adapter_weights(adapted, tensors, adapter.name)
    report.taken |= {name: name for name in tensors}
    return adapted


def _import_lora(tensors: dict[str, Any], language_model: nn.Module, base_name: str, report: ImportReport) -> nn.Module:
    """An adapter whose layers each bring A [rank, in], B [out, rank] and alpha / rank."""
    layers = sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))
    if not layers:
        raise WeightsError(f"{LORA_FILE} holds no LoRA weights.")
    modules = dict(language_model.named_modules())
    for layer in layers:
        if layer not in modules:
            raise WeightsError(f"{LORA_FILE} names a layer that {base_name} does not have: {layer}.")
        if f"{layer}.lora_B.weight" not in tensors:
            raise WeightsError(f"{LORA_FILE} lacks '{layer}.lora_B.weight'.")
    ranks = {tensors[f"{layer}.lora_A.weight"].shape[0] for layer in layers}
    scales = {_scale(tensors.get(f"{layer}.scaling")) for layer in layers}
    if len(ranks) != 1 or len(scales) != 1:
        raise WeightsError(
            f"{LORA_FILE} has ranks {sorted(ranks)} and scales {sorted(scales)}; there must be one of each."
        )
    (rank,), (scale,) = ranks, scales
    adapted = add_adapter(
        language_model, rank=rank, alpha=rank * scale, dropout=0.0, base_name=base_name, target_modules=layers
    )
    renamed = {
        f"base_model.model.{name}": tensor
        for name, tensor in tensors.items()
        if name.endswith(("_A.weight", "_B.weight"))
    }
    set_adapter_weights(adapted, renamed, LORA_FILE)
    report.taken |= {name.removeprefix("base_model.model."): name for name in renamed}
    report.taken |= {name: "alpha / rank" for name in tensors if name.endswith(".scaling")}
    report.ignored |= {name: "no part of a LoRA adapter" for name in tensors if name not in report.taken}
    return adapted


def _scale(value: Any) -> float:
    """A layer's alpha / rank: a number, a tensor of one, or PEFT's dictionary of one adapter."""
    if isinstance(value, dict):
        value = next(iter(value.values()), None)
    return 1.0 if value is None else float(value)
