"""Checkpoints that other projects published → a folder that chats.

Four layouts are known by the names of their tensors:

    LayerNorm, Linear, GELU, Linear     pre_norm.*, proj.0.*, proj.2.*
    Linear, GELU, Linear                layer1.*, layer2.*, and buffers initial_weights*
    Linear, residual block              weight, bias, and of the block pre_norm.*, proj.0.*, proj.2.*
    Linear                              linear.weight, linear.bias

The adapter beside it is PEFT's folder, or ``lora_weights.pt`` with ``….lora_A.weight``, ``….lora_B.weight`` and
``….scaling`` of each layer. What is pickled is read with ``weights_only=True``: it can hold numbers, and run nothing.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import WeightsError
from ..fetching import fetch
from ..fetching.cache import convert_once
from ..models.language_model import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    add_adapter,
    attach_adapter,
    empty_language_model,
    load_language_model,
    set_adapter_weights,
)
from ..models.projector import Marked, ProjectorConfig, build_projector
from ..models.vision_language_model import MultimodalModel
from ..presets import HubRepository, Preset
from .weights_folder import save_weights

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]
LORA_FILE = "lora_weights.pt"
PROJECTOR_FILES = ("image_projector.pth", "projector.pth", "resblock.pth")


@dataclass(frozen=True)
class Layout:
    """A projector as others stored it."""

    names: dict[str, str]  # what their names begin with -> what ours begin with
    first: str  # our name of the matrix that reads features
    hidden: str | None  # of the one whose rows are the hidden width
    last: str  # of one that writes tokens


LAYOUTS = {
    "mlp": Layout(
        {"pre_norm.": "pre_norm.", "proj.0.": "proj.0.", "proj.2.": "proj.2."},
        first="proj.0.weight",
        hidden="proj.0.weight",
        last="proj.2.weight",
    ),
    "llava": Layout(
        {"layer1.": "linear_1.", "layer2.": "linear_2."},
        first="linear_1.weight",
        hidden="linear_1.weight",
        last="linear_2.weight",
    ),
    "resblock": Layout(
        {
            "weight": "linear.weight",
            "bias": "linear.bias",
            "pre_norm.": "mlp.pre_norm.",
            "proj.0.": "mlp.proj.0.",
            "proj.2.": "mlp.proj.2.",
        },
        first="linear.weight",
        hidden="mlp.proj.0.weight",
        last="linear.weight",
    ),
    "linear": Layout({"linear.": ""}, first="weight", hidden=None, last="weight"),
}
SNAPSHOT_PREFIX = "initial_weights"  # copies that the second layout keeps to see how far it has moved


@dataclass
class ImportReport:
    """What became of every tensor: their name -> ours, or why there is none."""

    taken: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    kind: str = ""

    def __str__(self) -> str:
        lines = [
            f"{theirs}  →  {ours}" if theirs != ours else f"{theirs}  taken" for theirs, ours in self.taken.items()
        ]
        lines += [f"{theirs}  ignored: {reason}" for theirs, reason in self.ignored.items()]
        return "\n".join(
            [*lines, f"{len(self.taken)} tensors taken, {len(self.ignored)} ignored; projector: {self.kind}"]
        )


def import_checkpoint(
    folder: str | Path,
    out: str | Path,
    preset: Preset,
    *,
    projector_files: Sequence[str | Path] = (),
    marker_token: str | None = None,
) -> ImportReport:
    """Writes a weights folder for ``preset`` from a published checkpoint.

    Args:
        folder: holds the adapter and the projector's files.
        out: the folder to write.
        projector_files: the projector's files, where they have other names than ``PROJECTOR_FILES``.
        marker_token: the word that ends every picture, in the layouts that have one; its embedding becomes ours.

    Raises:
        WeightsError: a file is missing or unreadable, a tensor is missing, unknown or of another shape.
    """
    folder, report = Path(folder), ImportReport()
    files = [Path(file) for file in projector_files] or [folder / name for name in PROJECTOR_FILES]
    files = [file for file in files if projector_files or file.is_file()]
    if not files:
        raise WeightsError(f"'{folder.name}' holds no projector: name its files with --projector.")
    language_model = empty_language_model(preset.language_model)  # its shapes are enough, and fit in any memory
    projector, config = _import_projector(files, preset, report)
    if config.token_width != language_model.config.hidden_size:
        raise WeightsError(
            f"The projector makes tokens of {config.token_width} numbers; {preset.language_model.name} reads "
            f"{language_model.config.hidden_size}."
        )
    if marker_token:
        projector = Marked(projector, config.token_width)
        projector.marker.data = _embedding_of(marker_token, preset)
        config = replace(config, marker=True)
    language_model = _import_adapter(folder, language_model, preset.language_model.name, report)
    save_weights(MultimodalModel(language_model, projector, config), out, preset)
    return report


def import_published(source: HubRepository, preset: Preset) -> Path:
    """The weights folder of a checkpoint that others published, imported into the cache the first time.

    Raises:
        AssetError: it could not be fetched.
        WeightsError: it is not as expected.
    """

    def convert(target: Path) -> None:
        logger.info("Importing the weights that %s published", source.name)
        import_checkpoint(fetch(source, (LORA_FILE, PROJECTOR_FILES[0])), target, preset)

    return convert_once(f"{source.name.replace('/', '--')}-1", convert)  # "-1": the version of what import writes


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a .safetensors file, or of a pickled one, read without running anything.

    Raises:
        WeightsError: it is missing or damaged, or holds more than tensors and numbers.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path.name} holds more than numbers, so it was not read: it could run anything."
        ) from error
    except (OSError, RuntimeError, SafetensorError, EOFError) as error:
        raise WeightsError(f"{path.name} is missing or damaged.") from error


def _import_projector(files: Sequence[Path], preset: Preset, report: ImportReport) -> tuple[nn.Module, ProjectorConfig]:
    tensors: Tensors = {}
    for file in files:
        tensors |= read_tensors(file)
    for name in [name for name in tensors if name.startswith(SNAPSHOT_PREFIX)]:
        report.ignored[name] = "the weights before training"
        del tensors[name]
    kind, renamed = _recognise(tensors)
    report.kind = kind
    report.taken |= renamed
    ours = {renamed[name]: tensor.float() for name, tensor in tensors.items()}
    config = _shape_of(kind, ours, preset)
    projector = build_projector(config)
    for name, tensor in projector.state_dict().items():
        if name not in ours:
            raise WeightsError(f"The projector lacks '{name}', which a projector of the kind {kind} has.")
        if ours[name].shape != tensor.shape:
            raise WeightsError(
                f"The projector's '{name}' is {tuple(ours[name].shape)}; expected {tuple(tensor.shape)}."
            )
    projector.load_state_dict(ours)
    return projector, config


def _recognise(tensors: Tensors) -> tuple[str, dict[str, str]]:
    """The kind of projector, and their names -> ours."""
    for kind, layout in LAYOUTS.items():
        renamed = {
            name: name.replace(theirs, ours, 1)
            for name in tensors
            for theirs, ours in layout.names.items()
            if name.startswith(theirs)
        }
        used = {theirs for theirs in layout.names for name in tensors if name.startswith(theirs)}
        if renamed.keys() == tensors.keys() and used == layout.names.keys():
            return kind, renamed
    known = "; ".join(f"{kind}: {', '.join(layout.names)}" for kind, layout in LAYOUTS.items())
    raise WeightsError(f"I know no projector with the tensors {', '.join(sorted(tensors))}. Known are {known}.")


def _shape_of(kind: str, tensors: Tensors, preset: Preset) -> ProjectorConfig:
    """What the projector is built from, read from its matrices."""
    layout, encoder = LAYOUTS[kind], preset.image_encoder
    for name in (layout.first, layout.last, layout.hidden):
        if name and name not in tensors:
            raise WeightsError(f"The projector lacks '{name}', which a projector of the kind {kind} has.")
    if tensors[layout.first].shape[1] != encoder.image_dim:
        raise WeightsError(
            f"The projector reads features of {tensors[layout.first].shape[1]} numbers; {encoder.name} as "
            f"'{preset.name}' uses it gives {encoder.image_dim}."
        )
    return ProjectorConfig(
        kind=kind,
        image_width=encoder.image_dim,
        hidden_width=tensors[layout.hidden].shape[0] if layout.hidden else 0,
        token_width=tensors[layout.last].shape[0],
        feature_count=encoder.feature_count,
    )


def _embedding_of(token: str, preset: Preset) -> torch.Tensor:
    """[token_width] of a word that is one token of the language model."""
    language_model, tokenizer = load_language_model(preset.language_model, torch.float32)
    token_ids = tokenizer.encode(token, add_special_tokens=False)
    if len(token_ids) != 1:
        raise WeightsError(f"'{token}' is {len(token_ids)} tokens; what ends a picture has to be one.")
    return language_model.get_input_embeddings().weight[token_ids[0]].detach().clone()


def _import_adapter(folder: Path, language_model: nn.Module, base_name: str, report: ImportReport) -> nn.Module:
    """The language model with the adapter of a published folder: PEFT's own, or ``lora_weights.pt``."""
    if (folder / LORA_FILE).is_file():
        return _import_lora(read_tensors(folder / LORA_FILE), language_model, base_name, report)
    adapter = next((path.parent for path in sorted(folder.rglob(ADAPTER_CONFIG))), None)
    if adapter is None:
        raise WeightsError(f"'{folder.name}' holds no adapter: neither {ADAPTER_CONFIG} nor {LORA_FILE}.")
    weights = adapter / ADAPTER_WEIGHTS
    tensors = read_tensors(weights if weights.is_file() else weights.with_suffix(".bin"))
    adapted = attach_adapter(language_model, adapter)
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
