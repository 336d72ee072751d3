"""LLaVA models of transformers as weights: what a folder or a repository of the Hub brings, as a preset."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import AssetError, WeightsError
from ..fetching import fetch
from ..fetching.sources import HUB_NAME, HubRepository
from ..models.language_model import empty_language_model
from ..models.llava_folder import LlavaFolder, is_llava_folder, llava_template, open_llava
from ..models.projector import ProjectorConfig
from ..presets import (
    LLAVA,
    PRESETS,
    SMOL,
    WHISPER_BASE,
    ImageEncoderPreset,
    LanguageModelPreset,
    Preset,
    ProjectorPreset,
)
from .weights_config import why_no_weights


def find_llava(weights: str | Path | HubRepository) -> HubRepository | None:
    """The LLaVA model that ``weights`` name; None if they are a folder of another kind, or nothing that exists.

    A repository is fetched from the Hub the first time.

    Raises:
        WeightsError: there is no such folder here, and no such LLaVA model on the Hub.
    """
    if isinstance(weights, HubRepository):
        return weights if is_llava_folder(fetch(weights)) else None
    if Path(weights).exists() or not HUB_NAME.fullmatch(str(weights)):
        return HubRepository(str(weights)).absolute() if is_llava_folder(Path(weights)) else None
    known = {preset.language_model.source.name: preset for preset in PRESETS.values() if preset.language_model.is_llava}
    source = HubRepository(str(weights))
    if isinstance(found := known[source.name].language_model.source if source.name in known else None, HubRepository):
        source = found
    try:
        folder = fetch(source)
    except AssetError as error:
        raise WeightsError(
            f"There is no folder '{weights}' here, and the Hub gave no model of this name: {error}"
        ) from error
    if not is_llava_folder(folder):
        raise WeightsError(why_no_weights(folder, str(weights)))
    return source


def llava_preset(source: HubRepository, preset: Preset | None = None) -> Preset:
    """The preset that a LLaVA model makes.

    Args:
        preset: whose speech model to keep; by default, one that is available from the same source as the model.

    Raises:
        AssetError: the model could not be fetched.
        WeightsError: a part of it is of a kind that mmchat does not know.
    """
    folder = fetch(source)
    name = Path(source.name).name
    llava = open_llava(folder, name)
    known = next((one for one in PRESETS.values() if one.language_model.source == source), None)
    config = llava.config
    encoder = _encoder(llava, source)
    if known:
        language_model = known.language_model
    else:
        language_model = LanguageModelPreset(name, source, LLAVA, 0, languages=())
        count = sum(weight.numel() for weight in empty_language_model(language_model).parameters())
        language_model = replace(language_model, parameters=count)
    base = preset or known or SMOL
    if not preset and not known and not Path(source.name).is_dir():
        base = replace(base, speech=WHISPER_BASE)
    return replace(
        base,
        name=known.name if known else name,
        description=known.description
        if known
        else f"The LLaVA model {name} ({config.text_config.model_type}, {encoder.feature_count} features per picture)",
        language_model=language_model,
        image_encoder=encoder,
        projector=ProjectorPreset(kind="llava", intermediate_size=config.text_config.hidden_size),
        weights=source,
        prompt_template=None,
        chat_template=llava_template(folder, name),
    )


def _encoder(llava: LlavaFolder, source: HubRepository) -> ImageEncoderPreset:
    """The image encoder inside a LLaVA model, with the features that its config takes."""
    config = llava.config.vision_config
    is_siglip = config.model_type.startswith("siglip")
    count = (config.image_size // config.patch_size) ** 2 + (not is_siglip) - (not llava.keeps_first)
    layers = llava.layers
    return ImageEncoderPreset(
        name=f"{llava.name}-tower",
        source=source,
        resolution=config.image_size,
        features="patches",
        feature_count=count,
        image_dim=config.hidden_size * (1 if isinstance(layers, int) else len(layers)),
        layer=layers,
        class_token=llava.keeps_first and not is_siglip,
        drops_patch=is_siglip and not llava.keeps_first,
    )


def projector_config(llava: LlavaFolder, encoder: ImageEncoderPreset) -> ProjectorConfig:
    """What the projector of a LLaVA model is built from."""
    width = llava.config.text_config.hidden_size
    return ProjectorConfig(
        kind="llava",
        image_dim=encoder.image_dim,
        intermediate_size=width,
        hidden_size=width,
        feature_count=encoder.feature_count,
        activation=llava.config.projector_hidden_act,
        bias=llava.config.multimodal_projector_bias,
    )
