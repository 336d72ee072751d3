"""mmchat.json: what a weights folder says about the models that its weights were trained for.

It also holds the prompt template of weights that were trained with one other than ours, the image encoder that was
chosen in place of the preset's, and the name of the LLaVA model that the weights were trained on.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path

from ..errors import WeightsError
from ..fetching.sources import HubRepository
from ..models.chat_formats import PromptTemplate
from ..models.llava_folder import MODEL_CONFIG, MODEL_TYPE, read_json
from ..models.projector import ProjectorConfig
from ..presets import PRESETS, ImageEncoderPreset, Preset

CONFIG_FILE = "mmchat.json"
FORMAT_VERSION = 2
TEMPLATE_KEY = "picture_layout"  # the first name of a prompt template; kept, so that older versions read new folders


def _identity(preset: Preset) -> dict:
    """What weights were trained for; weights of another identity are refused."""
    encoder = preset.image_encoder
    return {
        "language_model": preset.language_model.name,
        "chat_format": preset.language_model.chat_format,
        "image_encoder": encoder.title,
        "image_features": encoder.feature_kind,
    }


def _encoder_of_choice(preset: Preset) -> dict:
    """The chosen image encoder's fields; empty for the preset's own."""
    encoder = preset.image_encoder
    if preset.language_model.is_llava and encoder.source == preset.language_model.source:
        return {}
    is_own = preset.name in PRESETS and PRESETS[preset.name].image_encoder == encoder
    is_chosen = encoder.features != "grid" and not is_own  # those of the package index are known by their names
    return {"image_encoder_preset": asdict(encoder)} if is_chosen else {}


def write_config(folder: Path, preset: Preset, projector: ProjectorConfig, has_adapter: bool) -> None:
    """Writes mmchat.json."""
    config = {
        "format_version": FORMAT_VERSION,
        **_identity(preset),
        **({"llava": asdict(preset.language_model.source)} if preset.language_model.is_llava else {}),
        **_encoder_of_choice(preset),
        "projector": asdict(projector),
        "adapter": has_adapter,
    }
    if preset.prompt_template:
        config[TEMPLATE_KEY] = asdict(preset.prompt_template)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def read_config(folder: Path) -> dict:
    """Reads mmchat.json.

    Raises:
        WeightsError: it is missing or damaged, or has another format version.
    """
    config = read_json(folder / CONFIG_FILE)
    if config is None:
        raise WeightsError(why_no_weights(folder))
    if config.get("format_version") != FORMAT_VERSION:
        raise WeightsError(
            f"'{folder.name}' has format version {config.get('format_version')}; this mmchat reads {FORMAT_VERSION}."
        )
    return config


def why_no_weights(folder: Path, name: str = "") -> str:
    """Says in a sentence why a folder holds neither trained weights nor a LLaVA model.

    Args:
        name: what to call it; the folder's name if empty.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = name or folder.resolve().name
    config = read_json(folder / MODEL_CONFIG) or {}
    kind = str(config.get("model_type", ""))
    damaged = [file for file in (CONFIG_FILE, MODEL_CONFIG) if (folder / file).exists()]
    if not folder.exists():
        return f"There is no folder '{name}'."
    if not folder.is_dir():
        return f"'{name}' is a file; name the folder that holds the weights."
    if not any(folder.iterdir()):
        return f"'{name}' is not a weights folder: it is empty."
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"'{name}' is a text model ('{kind}'), which cannot see: name a LLaVA model or trained weights."
    if kind:
        return f"'{name}' is a model of the type '{kind}'; only models of the type '{MODEL_TYPE}' can be weights."
    if damaged:
        return f"The {damaged[0]} of '{name}' is damaged: copy it again."
    return (
        f"'{name}' is not a weights folder: it has neither {CONFIG_FILE}, which training writes, nor the "
        f"{MODEL_CONFIG} of a LLaVA model. A checkpoint of another project needs import_checkpoint.py first."
    )


def is_made_for(config: dict, preset: Preset) -> bool:
    """Whether weights were trained for exactly a preset's models."""
    return _identity(preset).items() <= config.items()


def check_identity(config: dict, folder: Path, preset: Preset, any_encoder: bool) -> None:
    """Refuses weights that were made for other models than a preset's.

    Args:
        any_encoder: accept weights of another image encoder.

    Raises:
        WeightsError: the sentence names what differs.
    """
    for key, expected in _identity(preset).items():
        if config.get(key) != expected and not (any_encoder and key in ("image_encoder", "image_features")):
            raise WeightsError(
                f"The weights in '{folder.name}' were made for {key.replace('_', ' ')} '{config.get(key)}', "
                f"but the preset '{preset.name}' has '{expected}'."
            )


def llava_of(config: dict, folder: Path) -> HubRepository | None:
    """The LLaVA model that weights were trained on."""
    stored = config.get("llava")
    try:
        return _source_of(stored, folder, "llava") if stored else None
    except TypeError as error:
        raise WeightsError(
            f"The entry 'llava' in the {CONFIG_FILE} of '{folder.name}' does not name a LLaVA model."
        ) from error


def _source_of(stored: dict, folder: Path, entry: str) -> HubRepository:
    source = HubRepository(**stored)
    if source.is_missing_folder:
        raise WeightsError(
            f"The weights in '{folder.name}' need the model in '{Path(source.name).name}', a folder that is no longer "
            f"where it was: move it back, or correct its path under '{entry}' in {CONFIG_FILE}."
        )
    return source.absolute()


def prompt_template_of(config: dict, folder: Path) -> PromptTemplate | None:
    """The prompt template of the weights; None if they were trained with their chat format's own."""
    stored = config.get(TEMPLATE_KEY)
    if stored is None:
        return None
    name = f"The prompt template in the {CONFIG_FILE} of '{folder.name}'"
    if not isinstance(stored, dict):
        raise WeightsError(f"{name} must be a mapping of field names to values.")
    if unknown := sorted(stored.keys() - {field.name for field in fields(PromptTemplate)}):
        raise WeightsError(f"{name} has unknown fields: {', '.join(unknown)}.")
    try:
        return PromptTemplate(**stored)
    except TypeError as error:
        raise WeightsError(f"{name} has a field of the wrong type. {error}") from error


def chosen_encoder_of(config: dict, folder: Path) -> ImageEncoderPreset | None:
    """The image encoder that was chosen in training; None if it is the preset's."""
    chosen = config.get("image_encoder_preset")
    if not chosen:
        return None
    try:
        settings = {**chosen, "source": _source_of(chosen["source"], folder, "image_encoder_preset")}
        if "width" in settings:
            settings["image_dim"] = settings.pop("width")  # its name in older folders
        return ImageEncoderPreset(**settings)
    except (KeyError, TypeError) as error:
        raise WeightsError(
            f"The entry 'image_encoder_preset' in the {CONFIG_FILE} of '{folder.name}' describes no image encoder."
        ) from error
