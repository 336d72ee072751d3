"""Import checkpoints of other projects into a weights folder.

The kind of projector is recognized by its tensor names:

    LayerNorm, Linear, GELU, Linear     pre_norm.*, proj.0.*, proj.2.*
    Linear, GELU, Linear                layer1.*, layer2.*, and buffers initial_weights*
    Linear, residual block              weight, bias, and of the block pre_norm.*, proj.0.*, proj.2.*
    Linear, LayerNorm, residual blocks  output.*, norm.*, projection_layers.0.0.*, projection_layers.0.2.*, …
    Linear                              linear.weight, linear.bias; or weight, bias

A file holds the tensors directly or under ``model_state_dict``, next to the trainer's state. The adapter is a PEFT
folder, or ``lora_weights.pt`` with ``….lora_A.weight``, ``….lora_B.weight`` and ``….scaling`` for each layer. Pickled
files are read with ``weights_only=True``, so they cannot run code.
"""

from __future__ import annotations

import logging
import pickle
import re
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
from ..models.image_encoder import find_image_encoder
from ..models.language_model import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    add_adapter,
    attach_adapter,
    empty_language_model,
    load_language_model,
    set_adapter_weights,
)
from ..models.projector import ProjectorConfig, WithEndOfImage, build_projector
from ..models.vision_language_model import VisionLanguageModel
from ..presets import HubRepository, LanguageModelPreset, Preset
from .projects import PROJECTS, STORED_PROJECTORS, Project, StoredProjector
from .weights_folder import save_weights

logger = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]
LORA_FILE = "lora_weights.pt"
TRAINED = "model_state_dict"  # in files that hold the trainer's state, too
RESIZED = re.compile(r"\.(embed_tokens|lm_head)\.(weight|bias)$")  # PEFT saves them where a token was added
AUTO, NO_PROJECT = "auto", "none"
PROJECTOR_FILES = ("image_projector.pth", "projector.pth", "resblock.pth")


SNAPSHOT_PREFIX = "initial_weights"  # copies that the second layout keeps to see how far it has moved


@dataclass
class ImportReport:
    """What happened to each tensor (their name -> ours, or why it was ignored), and what was assumed."""

    taken: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kind: str = ""

    def __str__(self) -> str:
        lines = [
            f"{theirs}  →  {ours}" if theirs != ours else f"{theirs}  taken" for theirs, ours in self.taken.items()
        ]
        lines += [f"{theirs}  ignored: {reason}" for theirs, reason in self.ignored.items()]
        lines += [f"{len(self.taken)} tensors taken, {len(self.ignored)} ignored; projector: {self.kind}"]
        return "\n".join(lines + self.notes)


def import_checkpoint(
    folder: str | Path,
    out: str | Path,
    preset: Preset,
    *,
    projector_files: Sequence[str | Path] = (),
    marker_token: str | None = None,
    project: str = AUTO,
    image_encoder: str | None = None,
    image_features: str | None = None,
    image_layer: int | None = None,
    class_token: bool | None = None,
) -> ImportReport:
    """Writes a weights folder for ``preset`` from a published checkpoint.

    Args:
        folder: holds the adapter and the projector's files.
        out: the folder to write.
        projector_files: the projector's files, where they have other names than ``PROJECTOR_FILES``.
        marker_token: the word that ends every picture, in the layouts that have one; its embedding becomes ours.
        project: whose layout of pictures and questions the weights learned: a key of ``PROJECTS``, "none" for the
            preset's own, or "auto" to tell it by the names of the projector's tensors.
        image_encoder: the repository or folder of the image encoder that the projector reads; where it is not told, it
            is the project's, else the preset's. Tensors do not tell: ViT-B/16 and B/32 are equally wide.
        image_features, image_layer, class_token: what is taken of it, as ``find_image_encoder`` has them.

    Raises:
        WeightsError: a file is missing or unreadable, a tensor is missing, unknown or of another shape.
    """
    folder, report = Path(folder), ImportReport()
    files = [Path(file) for file in projector_files] or [folder / name for name in PROJECTOR_FILES]
    files = [file for file in files if projector_files or file.is_file()]
    if not files:
        raise WeightsError(f"'{folder.name}' holds no projector: name its files with --projector.")
    language_model = empty_language_model(preset.language_model)  # its shapes are enough, and fit in any memory
    tensors = _projector_tensors(files, report)
    stored, renamed = _recognize(tensors)
    report.taken |= renamed
    known = _find_project(project, stored, preset, report)
    chosen = {"features": image_features, "layer": image_layer, "class_token": class_token}
    preset = _as_trained(preset, known, image_encoder, chosen, report)
    projector, config = _build(stored, {renamed[name]: tensor.float() for name, tensor in tensors.items()}, preset)
    report.kind = config.kind
    if config.hidden_size != language_model.config.hidden_size:
        raise WeightsError(
            f"The projector makes tokens of {config.hidden_size} numbers; {preset.language_model.name} reads "
            f"{language_model.config.hidden_size}."
        )
    if marker_token := marker_token or (known and known.marker_token):
        projector = WithEndOfImage(projector, config.hidden_size)
        projector.marker.data = _embedding_of(marker_token, preset)
        config = replace(config, end_of_image_token=True)
        report.notes.append(f"Every picture ends with the token of the word '{marker_token}'.")
    language_model = _import_adapter(folder, language_model, preset.language_model, report)
    save_weights(VisionLanguageModel(language_model, projector, config), out, preset)
    return report


def _find_project(name: str, stored: StoredProjector, preset: Preset, report: ImportReport) -> Project | None:
    """The project that a checkpoint comes from; None if it is to be asked as the preset is."""
    if name not in (AUTO, NO_PROJECT, *PROJECTS):
        raise WeightsError(f"I know no project '{name}'. I know {', '.join([*PROJECTS, NO_PROJECT])}.")
    project = PROJECTS.get(stored.project if name == AUTO else name)
    chat_format = preset.language_model.chat_format
    if project and project.chat_format != chat_format:
        if name != AUTO:
            raise WeightsError(f"{name}'s weights are for {project.chat_format}; '{preset.name}' is {chat_format}.")
        project = None
    if not project:
        report.notes.append("Pictures and questions are laid out as the preset has them: no project is known for it.")
        return None
    reason = f"as the tensors' names suggest; if it is another's, say --project NAME, or {NO_PROJECT}"
    report.notes.append(
        f"Pictures and questions are laid out as {stored.project if name == AUTO else name}'s code has them"
        + (f", {reason}." if name == AUTO else ".")
    )
    if project.note:
        report.notes.append(project.note)
    return project


def _as_trained(
    preset: Preset, project: Project | None, image_encoder: str | None, chosen: dict[str, Any], report: ImportReport
) -> Preset:
    """The preset with the picture layout and the image encoder that the checkpoint was trained with."""
    own, settings = preset.image_encoder, {}
    if project:
        preset = replace(preset, prompt_template=project.layout)
        image_encoder = image_encoder or project.image_encoder
        settings = {
            "features": project.image_features,
            "layer": project.image_layer,
            "class_token": project.class_token,
        }
    settings |= {name: value for name, value in chosen.items() if value is not None}
    settings = {name: settings.get(name, getattr(own, name)) for name in chosen}
    is_pooled = settings["features"] == own.features == "pooled"
    is_own = is_pooled or all(getattr(own, name) == value for name, value in settings.items())
    encoder = own
    if image_encoder:
        encoder = find_image_encoder(HubRepository(image_encoder), **settings)
    elif not is_own:
        encoder = replace(find_image_encoder(own.source, **settings), name=own.name)
    report.notes.append(
        f"Image encoder: {encoder.title}, {encoder.feature_kind}. Tensors do not tell which one it was; if it is "
        "another, name it with --image-encoder."
    )
    return replace(preset, image_encoder=encoder)


def import_published(source: HubRepository, preset: Preset) -> Path:
    """The weights folder of a checkpoint that others published, imported into the cache the first time.

    Raises:
        AssetError: it could not be fetched.
        WeightsError: it is not as expected.
    """

    def convert(target: Path) -> None:
        logger.info("Importing the weights that %s published", source.name)
        report = import_checkpoint(fetch(source, (LORA_FILE, PROJECTOR_FILES[0])), target, preset)
        for note in report.notes:
            logger.info("%s", note)

    return convert_once(f"{source.name.replace('/', '--')}-2", convert)  # "-2": the version of what import writes


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


def _projector_tensors(files: Sequence[Path], report: ImportReport) -> Tensors:
    """The projector's tensors, from one file or several."""
    tensors: Tensors = {}
    for file in files:
        content = read_tensors(file)
        if isinstance(content.get(TRAINED), dict):
            report.ignored |= {name: "the trainer's state" for name in content if name != TRAINED}
            content = content[TRAINED]
        tensors |= content
    for name in [name for name in tensors if name.startswith(SNAPSHOT_PREFIX)]:
        report.ignored[name] = "the weights before training"
        del tensors[name]
    return tensors


def _recognize(tensors: Tensors) -> tuple[StoredProjector, dict[str, str]]:
    """The kind of projector, and their names -> ours."""
    for stored in STORED_PROJECTORS:
        renamed = {
            name: name.replace(theirs, ours, 1)
            for name in tensors
            for theirs, ours in stored.names.items()
            if name.startswith(theirs)
        }
        used = {theirs for theirs in stored.names for name in tensors if name.startswith(theirs)}
        if renamed.keys() == tensors.keys() and used == stored.names.keys():
            return stored, renamed
    known = "; ".join(f"{stored.kind}: {', '.join(stored.names)}" for stored in STORED_PROJECTORS)
    raise WeightsError(f"I know no projector with the tensors {', '.join(sorted(tensors))}. Known are {known}.")


def _build(stored: StoredProjector, tensors: Tensors, preset: Preset) -> tuple[nn.Module, ProjectorConfig]:
    """The projector that tensors under our names make."""
    config = _shape_of(stored, tensors, preset)
    projector = build_projector(config)
    for name, tensor in projector.state_dict().items():
        if name not in tensors:
            raise WeightsError(f"The projector lacks '{name}', which a projector of the kind {config.kind} has.")
        if tensors[name].shape != tensor.shape:
            raise WeightsError(
                f"The projector's '{name}' is {tuple(tensors[name].shape)}; expected {tuple(tensor.shape)}."
            )
    if unknown := sorted(tensors.keys() - projector.state_dict().keys()):
        raise WeightsError(f"A projector of the kind {config.kind} has no place for '{unknown[0]}'.")
    projector.load_state_dict(tensors)
    return projector, config


def _shape_of(stored: StoredProjector, tensors: Tensors, preset: Preset) -> ProjectorConfig:
    """What the projector is built from, read from its matrices."""
    encoder = preset.image_encoder
    for name in (stored.first, stored.last, stored.hidden):
        if name and name not in tensors:
            raise WeightsError(f"The projector lacks '{name}', which a projector of the kind {stored.kind} has.")
    if tensors[stored.first].shape[1] != encoder.image_dim:
        raise WeightsError(
            f"The projector reads features of {tensors[stored.first].shape[1]} numbers; {encoder.name} as "
            f"'{preset.name}' uses it gives {encoder.image_dim}."
        )
    return ProjectorConfig(
        kind=stored.kind,
        image_dim=encoder.image_dim,
        intermediate_size=tensors[stored.hidden].shape[0] if stored.hidden else 0,
        hidden_size=tensors[stored.last].shape[0],
        feature_count=encoder.feature_count,
        depth=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}) or 1,
    )


def _embedding_of(token: str, preset: Preset) -> torch.Tensor:
    """[hidden_size] of a word that is one token of the language model."""
    language_model, tokenizer = load_language_model(preset.language_model, torch.float32)
    token_ids = tokenizer.encode(token, add_special_tokens=False)
    if len(token_ids) != 1:
        raise WeightsError(f"'{token}' is {len(token_ids)} tokens; what ends a picture has to be one.")
    return language_model.get_input_embeddings().weight[token_ids[0]].detach().clone()


def _import_adapter(
    folder: Path, language_model: nn.Module, base: LanguageModelPreset, report: ImportReport
) -> nn.Module:
    """The language model with the adapter of a published folder: PEFT's own, or ``lora_weights.pt``."""
    if (folder / LORA_FILE).is_file():
        return _import_lora(read_tensors(folder / LORA_FILE), language_model, base.name, report)
    adapter = next((path.parent for path in sorted(folder.rglob(ADAPTER_CONFIG))), None)
    if adapter is None:
        raise WeightsError(f"'{folder.name}' holds no adapter: neither {ADAPTER_CONFIG} nor {LORA_FILE}.")
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
