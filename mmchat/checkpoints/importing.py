"""Import checkpoints of other projects into a weights folder.

It finds the projector, the adapter, and the project that the checkpoint comes from, and accounts for every tensor.
Pickled files are read with ``weights_only=True``, so they cannot run code.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import WeightsError
from ..fetching import fetch
from ..fetching.cache import convert_once
from ..folders import empty_folder
from ..models.image_encoder import find_image_encoder
from ..models.language_model import empty_language_model, load_language_model
from ..models.llava_folder import is_llava_folder
from ..models.projector import WithEndOfImage
from ..models.vision_language_model import VisionLanguageModel
from ..presets import HubRepository, Preset
from .known_checkpoints import AUTO, NO_PROJECT, PROJECT_NAMES, PROJECTS, Project, StoredProjector
from .published_adapter import LORA_FILE, find_adapter, import_adapter
from .published_files import ImportReport
from .published_projector import build_published, read_projector, recognize_projector
from .weights_config import CONFIG_FILE
from .weights_folder import save_weights

logger = logging.getLogger(__name__)

PROJECTOR_FILES = ("image_projector.pth", "projector.pth", "resblock.pth")
PUBLISHED_FILES = (LORA_FILE, PROJECTOR_FILES[0])  # of a preset whose weights others published


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
        out: the folder to write; it must be empty.
        projector_files: the projector's files, where they have other names than ``PROJECTOR_FILES``.
        marker_token: the end-of-image token, if the checkpoint has one; its embedding becomes the projector's.
        project: whose prompt template the weights learned: a key of ``PROJECTS``, "none" for the
            preset's own, or "auto" to recognize it by the names of the projector's tensors.
        image_encoder: the repository or folder of the image encoder that the projector reads; by default the
            project's, else the preset's. Tensors do not show which: ViT-B/16 and B/32 are equally wide.
        image_features, image_layer, class_token: which features the projector reads; see ``find_image_encoder``.

    Raises:
        BadInput: ``out`` is not empty.
        WeightsError: a file is missing or unreadable, a tensor is missing, unknown or of another shape.
    """
    folder, out, report = Path(folder).resolve(), empty_folder(out), ImportReport()
    _check_project(project, preset)
    _check_folder(folder)
    files = [Path(file) for file in projector_files] or [folder / name for name in PROJECTOR_FILES]
    files = [file for file in files if projector_files or file.is_file()]
    if not files:
        raise WeightsError(f"'{folder.name}' holds no projector: name its files with --projector.")
    find_adapter(folder)
    tensors = read_projector(files, report)
    stored, renamed = recognize_projector(tensors)
    report.taken |= renamed
    language_model = empty_language_model(preset.language_model)  # its shapes are enough, and fit in any memory
    known = _find_project(project, stored, preset, report)
    chosen = {"features": image_features, "layer": image_layer, "class_token": class_token}
    preset = _as_trained(preset, known, image_encoder, chosen, report)
    projector, config = build_published(
        stored, {renamed[name]: tensor.float() for name, tensor in tensors.items()}, preset
    )
    report.kind = config.kind
    if config.hidden_size != language_model.config.hidden_size:
        raise WeightsError(
            f"The projector outputs embeddings of size {config.hidden_size}; {preset.language_model.name} expects "
            f"{language_model.config.hidden_size}."
        )
    if marker_token := marker_token or (known and known.marker_token):
        projector = WithEndOfImage(projector, config.hidden_size)
        projector.marker.data = _embedding_of(marker_token, preset)
        config = replace(config, end_of_image_token=True)
        report.notes.append(f"Every picture ends with the token of the word '{marker_token}'.")
    language_model = import_adapter(folder, language_model, preset.language_model, report)
    save_weights(VisionLanguageModel(language_model, projector, config), out, preset)
    return report


def _check_project(name: str, preset: Preset) -> None:
    if name not in PROJECT_NAMES:
        raise WeightsError(f"There is no project '{name}'. The projects are {', '.join(PROJECT_NAMES)}.")
    project, chat_format = PROJECTS.get(name), preset.language_model.chat_format
    if project and project.chat_format != chat_format:
        raise WeightsError(f"{name}'s weights are for {project.chat_format}; '{preset.name}' is {chat_format}.")


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        raise WeightsError(f"There is no folder '{folder.name}'.")
    if not folder.is_dir():
        raise WeightsError(f"'{folder.name}' is a file: name the folder of the adapter, and this with --projector.")
    if is_llava_folder(folder) or (folder / CONFIG_FILE).exists():
        kind = "a LLaVA model" if is_llava_folder(folder) else "a weights folder of mmchat"
        raise WeightsError(f"'{folder.name}' is {kind}, which needs no import: chat with it through --weights.")


def _find_project(name: str, stored: StoredProjector, preset: Preset, report: ImportReport) -> Project | None:
    """The project that a checkpoint comes from; None if it is to be asked as the preset is."""
    project = PROJECTS.get(stored.project if name == AUTO else name)
    if not project or project.chat_format != preset.language_model.chat_format:
        report.notes.append("Prompts follow the preset's template, because no project is known for these weights.")
        return None
    reason = f"as the tensors' names suggest; if the weights are another project's, say --project NAME, or {NO_PROJECT}"
    report.notes.append(
        f"Prompts follow the template in {stored.project if name == AUTO else name}'s code"
        + (f", {reason}." if name == AUTO else ".")
    )
    if project.note:
        report.notes.append(project.note)
    return project


def _as_trained(
    preset: Preset, project: Project | None, image_encoder: str | None, chosen: dict[str, Any], report: ImportReport
) -> Preset:
    """The preset with the prompt template and the image encoder that the checkpoint was trained with."""
    own, settings = preset.image_encoder, {}
    source = HubRepository(image_encoder) if image_encoder else None
    if project:
        preset = replace(preset, prompt_template=project.prompt_template)
        source = source or project.image_encoder
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
    if source:
        encoder = find_image_encoder(source, **settings)
    elif not is_own:
        encoder = replace(find_image_encoder(own.source, **settings), name=own.name)
    report.notes.append(
        f"Image encoder: {encoder.title}, {encoder.feature_kind}. Tensors do not show which one it was; if it is "
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
        report = import_checkpoint(fetch(source, PUBLISHED_FILES), target, preset)
        for note in report.notes:
            logger.info("%s", note)

    return convert_once(f"{source.name.replace('/', '--')}-2", convert)  # "-2": the version of what import writes


def _embedding_of(token: str, preset: Preset) -> torch.Tensor:
    """[hidden_size] of a word that is one token of the language model."""
    language_model, tokenizer = load_language_model(preset.language_model, torch.float32)
    token_ids = tokenizer.encode(token, add_special_tokens=False)
    if len(token_ids) != 1:
        raise WeightsError(f"'{token}' is {len(token_ids)} tokens; what ends a picture has to be one.")
    return language_model.get_input_embeddings().weight[token_ids[0]].detach().clone()
