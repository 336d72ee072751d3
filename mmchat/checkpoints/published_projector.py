"""The projector of a published checkpoint, recognized by the names of its tensors.

    LayerNorm, Linear, GELU, Linear     pre_norm.*, proj.0.*, proj.2.*
    Linear, GELU, Linear                layer1.*, layer2.*, and buffers initial_weights*
    Linear, residual block              weight, bias, and of the block pre_norm.*, proj.0.*, proj.2.*
    Linear, LayerNorm, residual blocks  output.*, norm.*, projection_layers.0.0.*, projection_layers.0.2.*, …
    Linear                              linear.weight, linear.bias; or weight, bias

A file holds the tensors directly or under ``model_state_dict``, next to the trainer's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ..errors import WeightsError
from ..models.projector import ProjectorConfig, build_projector
from ..presets import Preset
from .known_checkpoints import STORED_PROJECTORS, StoredProjector
from .published_files import ImportReport, read_tensors

Tensors = dict[str, torch.Tensor]
TRAINED = "model_state_dict"  # in files that hold the trainer's state, too
SNAPSHOT_PREFIX = "initial_weights"  # frozen initial copies that the second kind keeps to measure drift


def read_projector(files: Sequence[Path], report: ImportReport) -> Tensors:
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


def recognize_projector(tensors: Tensors) -> tuple[StoredProjector, dict[str, str]]:
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
    raise WeightsError(f"No known projector has the tensors {', '.join(sorted(tensors))}. Known projectors: {known}.")


def build_published(stored: StoredProjector, tensors: Tensors, preset: Preset) -> tuple[nn.Module, ProjectorConfig]:
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
            f"The projector expects features of size {tensors[stored.first].shape[1]}; {encoder.name}, as "
            f"'{preset.name}' uses it, outputs {encoder.image_dim}."
        )
    return ProjectorConfig(
        kind=stored.kind,
        image_dim=encoder.image_dim,
        intermediate_size=tensors[stored.hidden].shape[0] if stored.hidden else 0,
        hidden_size=tensors[stored.last].shape[0],
        feature_count=encoder.feature_count,
        depth=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}) or 1,
    )
