"""The format of a weights folder: what training leaves on disk, and what chat and training load again.

mmchat.json, projector.safetensors, adapter/ as PEFT writes it, and where there are any a tagger and a tuned image
encoder. A LLaVA model's own folder or repository counts as weights, too.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import WeightsError
from ..fetching import fetch
from ..fetching.sources import HubRepository
from ..models.chat_formats import PromptTemplate
from ..models.language_model import (
    ADAPTER_WEIGHTS,
    adapter_state,
    load_adapter,
    load_adapter_weights,
    load_language_model,
    save_adapter_config,
)
from ..models.llava_folder import LlavaFolder, open_llava
from ..models.projector import ProjectorConfig, build_projector
from ..models.stored_language_model import StoredLanguageModel
from ..models.tagger import load_tagger
from ..models.vision_language_model import VisionLanguageModel
from ..presets import (
    AUTO,
    EFFICIENTNETS,
    IMAGE_ENCODER_FILE,
    PRESETS,
    Preset,
    get_preset,
    tuned_image_encoder,
)
from .llava import find_llava, llava_preset, projector_config
from .weights_config import (
    CONFIG_FILE,
    check_identity,
    chosen_encoder_of,
    is_made_for,
    llava_of,
    prompt_template_of,
    read_config,
    write_config,
)

Weights = str | Path | HubRepository  # a weights folder, or a LLaVA model's folder or repository

PROJECTOR_FILE = "projector.safetensors"
ADAPTER_FOLDER = "adapter"


def trained_state(model: VisionLanguageModel) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors that a weights folder holds, file by file (the adapter's only where there is one)."""
    state = {PROJECTOR_FILE: model.projector.state_dict()}
    if model.has_adapter:
        state[f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}"] = adapter_state(model.language_model)
    return state


def save_weights(
    model: VisionLanguageModel, folder: str | Path, preset: Preset, dtype: torch.dtype | None = None
) -> None:
    """Writes a folder that chats.

    An image encoder that was tuned is copied into it.

    Args:
        dtype: the number format on disk; the weights' own if None.
    """
    folder = Path(folder)
    for name, tensors in trained_state(model).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.to(dtype or tensor.dtype).contiguous() for key, tensor in tensors.items()}, path)
    if model.has_adapter:
        save_adapter_config(model.language_model, folder / ADAPTER_FOLDER)
    write_config(folder, preset, model.projector_config, model.has_adapter)
    if model.tagger:
        model.tagger.save(folder)
    encoder = preset.image_encoder
    if encoder.is_tuned and encoder.source != (folder / IMAGE_ENCODER_FILE).resolve():
        shutil.copyfile(encoder.source, folder / IMAGE_ENCODER_FILE)


def load_weights(model: VisionLanguageModel, folder: str | Path) -> None:
    """Puts the weights of a folder into a model of the same shape.

    Raises:
        WeightsError: the folder's weights are missing, damaged or of another shape.
    """
    folder = Path(folder)
    _load_projector(model.projector, folder)
    if model.has_adapter:
        load_adapter_weights(model.language_model, folder / ADAPTER_FOLDER)


def default_weights(preset: Preset) -> Path | HubRepository:
    """A preset's own weights; ones that others published are imported into the cache the first time.

    Raises:
        AssetError: they could not be fetched.
        WeightsError: there are none, or they are not as expected.
    """
    if preset.language_model.is_llava:
        return preset.weights
    if isinstance(preset.weights, HubRepository):
        from .importing import import_published  # imported lazily: only presets with published weights need it

        return import_published(preset.weights, preset)
    if not preset.weights.is_dir():
        raise WeightsError(
            f"No weights come with the preset '{preset.name}'. Train some, or import a published checkpoint "
            "(training_scripts/import_checkpoint.py), and name their folder with --weights."
        )
    return preset.weights


def base_llava(weights: Weights) -> HubRepository | None:
    """The LLaVA model that weights are, or were trained on; None if there is none.

    Raises:
        WeightsError: the folder is not a weights folder.
    """
    return find_llava(weights) or llava_of(read_config(Path(weights)), Path(weights))


def preset_named(name: str, weights: Weights) -> Preset:
    """The preset of a name; with "auto", the one that weights were trained for.

    Raises:
        MmchatError: there is no such preset.
        WeightsError: the folder is not a weights folder, or brings a LLaVA model in place of the preset's models.
    """
    if name == AUTO:
        return infer_preset(weights)
    preset, llava = get_preset(name), base_llava(weights)
    if llava and Path(llava.name).name != preset.language_model.name:
        raise WeightsError(
            f"The weights bring the LLaVA model '{Path(llava.name).name}', which the preset '{name}' does not have: "
            f"leave the preset out, or set it to {AUTO}."
        )
    return preset


def infer_preset(weights: Weights) -> Preset:
    """The preset that weights were trained for; a LLaVA model makes its own.

    Raises:
        WeightsError: the folder is not a weights folder, or no known preset matches it.
    """
    if llava := base_llava(weights):
        return llava_preset(llava)
    config = read_config(Path(weights))
    name = config.get("language_model")
    presets = [preset for preset in PRESETS.values() if preset.language_model.name == name]
    if not presets:
        raise WeightsError(f"The weights in '{Path(weights).name}' were made for {name}, which no preset has.")
    return next((preset for preset in presets if is_made_for(config, preset)), presets[0])


def preset_for_weights(preset: Preset, weights: Weights) -> Preset:
    """The preset with the prompt template and the image encoder that weights were trained with.

    LLaVA models, and weights trained on one, bring everything but the speech model.

    Raises:
        WeightsError: the folder is not a weights folder, or was made for another language model.
    """
    if llava := find_llava(weights):
        return llava_preset(llava, preset)
    config = read_config(Path(weights))
    if llava := llava_of(config, Path(weights)):
        preset = llava_preset(llava, preset)
    preset = replace(preset, prompt_template=prompt_template_of(config, Path(weights)))
    if tuned := tuned_image_encoder(weights):
        return replace(preset, image_encoder=tuned)
    if named := EFFICIENTNETS.get(config.get("image_encoder")):
        sees_all = named.feature_kind == config.get("image_features")  # older weights read the square in the middle
        return replace(preset, image_encoder=replace(named, whole_image=sees_all))
    chosen = chosen_encoder_of(config, Path(weights))
    return replace(preset, image_encoder=chosen) if chosen else preset


def _apply_prompt_template(template: PromptTemplate, language_model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Adds the template's special tokens to the tokenizer, and its answer end to the stop tokens."""
    if template.added_tokens:
        added = {"additional_special_tokens": list(template.added_tokens)}
        tokenizer.add_special_tokens(added, replace_extra_special_tokens=False)
    rows = language_model.get_input_embeddings().num_embeddings
    if any(token_id >= rows for token_id in tokenizer.convert_tokens_to_ids(list(template.added_tokens))):
        raise WeightsError(f"The prompt template in '{folder.name}' adds too many tokens for the language model.")
    end = tokenizer.encode(template.answer_end, add_special_tokens=False)
    if len(end) == 1 and end[0] not in language_model.generation_config.eos_token_id:
        language_model.generation_config.eos_token_id = [*language_model.generation_config.eos_token_id, end[0]]


def load_model(
    preset: Preset,
    weights: Weights,
    dtype: torch.dtype,
    *,
    quantization: str = "none",
    trainable: bool = False,
    any_encoder: bool = False,
    stored: bool = False,
) -> tuple[VisionLanguageModel, Any]:
    """The vision-language model of a preset with the projector and adapter of a weights folder, and its tokenizer.

    Args:
        any_encoder: the weights may have been made for another image encoder, whose features have the same shape: a
            starting point for training with the preset's own. Their tagger, which reads the other encoder's features,
            is then left out.
        stored: leave the weights on disk if the base model comes as a GGUF file; see ``StoredLanguageModel``.

    Raises:
        WeightsError: the folder is not a weights folder, or was made for other models.
        AssetError: the base model could not be fetched.
    """
    if llava := find_llava(weights):
        return _load_llava(preset, llava, dtype, quantization, trainable)
    folder = Path(weights)
    config = read_config(folder)
    check_identity(config, folder, preset, any_encoder)
    try:
        projector_config = ProjectorConfig.from_json(config["projector"])
        projector, has_adapter = build_projector(projector_config), config["adapter"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"The {CONFIG_FILE} in '{folder.name}' does not describe a projector that this mmchat can build."
        ) from error
    _load_projector(projector, folder)
    adapter = folder / ADAPTER_FOLDER if has_adapter else None
    language_model: nn.Module
    if is_stored := stored and preset.language_model.is_gguf:
        language_model = StoredLanguageModel(preset.language_model, adapter)
        tokenizer = language_model.tokenizer
    else:
        language_model, tokenizer = load_language_model(preset.language_model, dtype, quantization)
    if template := prompt_template_of(config, folder):
        _apply_prompt_template(template, language_model, tokenizer, folder)
    if projector_config.hidden_size != language_model.config.hidden_size:
        raise WeightsError(f"The projector in '{folder.name}' has another hidden size than the language model.")
    if adapter and not is_stored:
        language_model = load_adapter(language_model, adapter, trainable=trainable)
    projector = projector.float().requires_grad_(trainable)
    tagger = load_tagger(folder, preset.image_encoder) if is_made_for(config, preset) else None
    model = VisionLanguageModel(language_model, projector, projector_config, tagger)
    return model.train(trainable), tokenizer


def _load_llava(
    preset: Preset, source: HubRepository, dtype: torch.dtype, quantization: str, trainable: bool
) -> tuple[VisionLanguageModel, Any]:
    """A LLaVA model's language model and projector, each read from its files."""
    name = preset.language_model.name
    if preset.language_model.source != source:
        raise WeightsError(f"{source.name} is a LLaVA model with a language model of its own, not with {name}.")
    llava = open_llava(fetch(source), name)
    config = projector_config(llava, preset.image_encoder)
    projector = build_projector(config)
    _fill(projector, llava)
    language_model, tokenizer = load_language_model(preset.language_model, dtype, quantization)
    model = VisionLanguageModel(language_model, projector.float().requires_grad_(trainable), config)
    return model.train(trainable), tokenizer


def _fill(projector: nn.Module, llava: LlavaFolder) -> None:
    try:
        projector.load_state_dict(llava.projector_state())
    except RuntimeError as error:
        raise WeightsError(f"The projector of '{llava.name}' has another size than its config.json says.") from error


def _load_projector(projector: nn.Module, folder: Path) -> None:
    try:
        projector.load_state_dict(load_file(folder / PROJECTOR_FILE))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"The projector in '{folder.name}' is missing, damaged or of another size.") from error
