"""The multimodal model: a language model that reads projected picture features among its tokens."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .errors import WeightsError
from .language_model import (
    ADAPTER_WEIGHTS,
    adapter_state,
    load_adapter,
    load_adapter_weights,
    load_language_model,
    save_adapter_config,
)
from .presets import (
    EFFICIENTNETS,
    PRESETS,
    TUNED,
    HubRepository,
    ImageEncoderPreset,
    Preset,
    tuned_image_encoder,
)
from .projector import ProjectorConfig, build_projector
from .prompt import IMAGE_TOKEN_ID
from .tagger import Tagger, load_tagger

logger = logging.getLogger(__name__)

CONFIG = "mmchat.json"
PROJECTOR = "projector.safetensors"
ADAPTER = "adapter"
FORMAT_VERSION = 2
IGNORED = -100  # the label that transformers' losses leave out


class MultimodalModel(nn.Module):
    """A causal language model, a LoRA adapter on it, and a projector beside it.

    The projector is a plain module outside PEFT, which freezes what it does not know.
    """

    accepts_loss_kwargs = True  # tells transformers' Trainer to pass num_items_in_batch

    def __init__(
        self,
        language_model: nn.Module,
        projector: nn.Module,
        projector_config: ProjectorConfig,
        tagger: Tagger | None = None,
    ):
        super().__init__()
        self.language_model = language_model
        self.projector = projector
        self.projector_config = projector_config
        self.tagger = tagger
        self._adapter_is_on = True

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.language_model, "peft_config")

    @property
    def tokens_per_image(self) -> int:
        """How many tokens a picture takes in a row."""
        return self.projector_config.tokens_per_image

    @property
    def device(self) -> torch.device:
        return next(self.projector.parameters()).device

    def tags(self, image_features: torch.Tensor) -> str:
        """What the language model is told of a picture in words, from its features, [features, image_width]."""
        return self.tagger.text(image_features) if self.tagger else ""

    def switch_adapter(self, on: bool) -> None:
        """Switches the adapter on or off, if there is one and it is not so already."""
        if self.has_adapter and on != self._adapter_is_on:
            adapted = self.language_model.base_model
            adapted.enable_adapter_layers() if on else adapted.disable_adapter_layers()
            self._adapter_is_on = on

    def splice(self, token_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        """Token ids with pictures in their places → input embeddings.

        Args:
            token_ids: [batch, length], IMAGE_TOKEN_ID where a picture's feature goes.
            image_features: [images, features, image_width] in reading order, or None where there is no picture; a
                projector with a marker makes one token more than there are features.

        Returns:
            [batch, length, token_width] in the language model's number format.

        Raises:
            ValueError: the number of places and the number of features differ.
        """
        is_image = token_ids == IMAGE_TOKEN_ID  # [batch, length]
        embeddings = self.language_model.get_input_embeddings()(token_ids.masked_fill(is_image, 0))
        if image_features is None:
            image_tokens = embeddings.new_empty(0, 0, embeddings.shape[-1])
        else:
            projector_dtype = next(self.projector.parameters()).dtype
            image_tokens = self.projector(image_features.to(projector_dtype))  # [images, tokens, token_width]
        count = image_tokens.shape[0] * image_tokens.shape[1]
        if int(is_image.sum()) != count:
            raise ValueError(f"{int(is_image.sum())} places for picture tokens, but {count} tokens")
        return embeddings.masked_scatter(is_image.unsqueeze(-1), image_tokens.to(embeddings.dtype))

    def forward(
        self,
        num_items_in_batch: torch.Tensor | int | None = None,
        label_weights: torch.Tensor | None = None,
        **batch: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The training loss: cross-entropy of each labelled token, predicted from the token before it.

        Args:
            num_items_in_batch: what the sum of losses is divided by; the number of labels if None.
            label_weights: [labels], what each label's loss is multiplied by; below 0 it becomes less likely.
            batch: as ``label_logits`` takes it.
        """
        logits, expected = self.label_logits(**batch)
        losses = nn.functional.cross_entropy(logits.float(), expected, reduction="none")  # [labels]
        if label_weights is not None:
            losses = losses * label_weights
        count = len(expected) if num_items_in_batch is None else num_items_in_batch
        return {"loss": losses.sum() / max(count, 1)}

    def label_logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        previous: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is predicted where a label stands, [labels, vocabulary], and the labels, [labels].

        Logits are the costliest part of a small model, so no others are computed.

        Args:
            input_ids, labels: [batch, length]; a label stands where its token stands, IGNORED elsewhere.
            attention_mask: [batch, length], 1 for tokens; or [batch, 1, length, length], true where the row's token
                reads the column's.
            position_ids: [batch, length]; 0, 1, 2, … if None.
            previous: [batch, length], the place of the token before each one; one place to the left if None.
            image_features: [images, features, image_width], or None.
        """
        decoder = self.causal_language_model.get_decoder()
        hidden = decoder(
            inputs_embeds=self.splice(input_ids, image_features),
            attention_mask=self._readable(attention_mask),
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state  # [batch, length, token_width]
        if previous is None:
            previous = torch.arange(-1, labels.shape[1] - 1, device=labels.device).expand_as(labels)
        row, place = (labels != IGNORED).nonzero(as_tuple=True)  # [labels] each
        logits = self.causal_language_model.get_output_embeddings()(hidden[row, previous[row, place]])
        return logits, labels[row, place]

    @property
    def causal_language_model(self) -> nn.Module:
        """The language model with its adapter, without PEFT's wrapper."""
        model = self.language_model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _readable(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """A mask of four dimensions as the attention function wants it: truth values for sdpa, else addends."""
        if attention_mask.dim() == 2 or self.causal_language_model.config._attn_implementation == "sdpa":
            return attention_mask
        dtype = self.causal_language_model.dtype
        return torch.zeros_like(attention_mask, dtype=dtype).masked_fill(~attention_mask, torch.finfo(dtype).min)

    def trained_state(self) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors that a weights folder holds, file by file (the adapter's only where there is one)."""
        state = {PROJECTOR: self.projector.state_dict()}
        if self.has_adapter:
            state[f"{ADAPTER}/{ADAPTER_WEIGHTS}"] = adapter_state(self.language_model)
        return state

    def save(self, folder: str | Path, preset: Preset, dtype: torch.dtype | None = None) -> None:
        """Writes a folder that chats: mmchat.json, projector.safetensors, and adapter/ where there is one.

        An image encoder that was tuned is copied beside them.

        Args:
            dtype: the number format on disk; the weights' own if None.
        """
        folder = Path(folder)
        for name, tensors in self.trained_state().items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: tensor.to(dtype or tensor.dtype).contiguous() for key, tensor in tensors.items()}, path)
        if self.has_adapter:
            save_adapter_config(self.language_model, folder / ADAPTER)
        config = {
            "format_version": FORMAT_VERSION,
            **_identity(preset),
            **_encoder_of_choice(preset),
            "projector": asdict(self.projector_config),
            "adapter": self.has_adapter,
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        if self.tagger:
            self.tagger.save(folder)
        tuned = preset.image_encoder.source
        if isinstance(tuned, Path) and tuned != (folder / TUNED).resolve():
            shutil.copyfile(tuned, folder / TUNED)

    def load_trained(self, folder: str | Path) -> None:
        """Puts the weights of a folder into this model, which has to be of the same shape.

        Raises:
            WeightsError: the folder's weights are missing, damaged or of another shape.
        """
        folder = Path(folder)
        _load_projector(self.projector, folder)
        if self.has_adapter:
            load_adapter_weights(self.language_model, folder / ADAPTER)


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
    """Of an image encoder that somebody chose in place of the preset's own: all of it, so that chat finds it again."""
    encoder = preset.image_encoder
    is_own = preset.name in PRESETS and PRESETS[preset.name].image_encoder == encoder
    is_chosen = isinstance(encoder.source, HubRepository) and not is_own
    return {"image_encoder_preset": asdict(encoder)} if is_chosen else {}


def preset_trained(weights: str | Path) -> Preset:
    """The preset that the weights of a folder were trained for.

    Raises:
        WeightsError: the folder is no weights folder, or was made for no preset there is.
    """
    name = _read_config(Path(weights)).get("language_model")
    for preset in PRESETS.values():
        if preset.language_model.name == name:
            return preset
    raise WeightsError(f"The weights in '{Path(weights).name}' were made for {name}, which no preset has.")


def preset_of(preset: Preset, weights: str | Path) -> Preset:
    """The preset with the image encoder that the weights of a folder were trained with, where that is another one.

    Raises:
        WeightsError: the folder is no weights folder, or was made for another language model.
    """
    config = _read_config(Path(weights))
    if tuned := tuned_image_encoder(weights):
        return replace(preset, image_encoder=tuned)
    if named := EFFICIENTNETS.get(config.get("image_encoder")):
        return replace(preset, image_encoder=named)
    chosen = config.get("image_encoder_preset")
    if not chosen:
        return preset
    try:
        encoder = ImageEncoderPreset(**{**chosen, "source": HubRepository(**chosen["source"])})
    except (KeyError, TypeError) as error:
        raise WeightsError(f"The {CONFIG} in '{Path(weights).name}' names no image encoder I know.") from error
    return replace(preset, image_encoder=encoder)


def load_model(
    preset: Preset,
    weights: str | Path,
    dtype: torch.dtype,
    *,
    quantization: str = "none",
    trainable: bool = False,
    any_encoder: bool = False,
) -> tuple[MultimodalModel, object]:
    """The multimodal model of a preset with the projector and adapter of a weights folder, and its tokenizer.

    Args:
        any_encoder: the weights may have been made for another image encoder, whose features have the same shape: a
            start to go on from with the preset's. Their tagger, which reads the other's features, is left out then.

    Raises:
        WeightsError: the folder is no weights folder, or was made for other models.
        AssetError: the base model could not be fetched.
    """
    folder = Path(weights)
    config = _read_config(folder)
    _check_identity(config, folder, preset, any_encoder)
    try:
        projector_config = ProjectorConfig(**config["projector"])
        projector, has_adapter = build_projector(projector_config), config["adapter"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"The {CONFIG} in '{folder.name}' describes no projector I know.") from error
    _load_projector(projector, folder)
    language_model, tokenizer = load_language_model(preset.language_model, dtype, quantization)
    if projector_config.token_width != language_model.config.hidden_size:
        raise WeightsError(f"The projector in '{folder.name}' makes tokens of another width than the model reads.")
    if has_adapter:
        language_model = load_adapter(language_model, folder / ADAPTER, trainable=trainable)
    projector = projector.float().requires_grad_(trainable)
    is_same_encoder = _identity(preset).items() <= config.items()
    tagger = load_tagger(folder, preset.image_encoder) if is_same_encoder else None
    model = MultimodalModel(language_model, projector, projector_config, tagger)
    return model.train(trainable), tokenizer


def _load_projector(projector: nn.Module, folder: Path) -> None:
    try:
        projector.load_state_dict(load_file(folder / PROJECTOR))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"The projector in '{folder.name}' is missing, damaged or of another size.") from error


def _read_config(folder: Path) -> dict:
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"'{folder.name}' is not a folder of mmchat weights: it has no readable {CONFIG}."
        ) from error
    if not isinstance(config, dict):
        raise WeightsError(f"'{folder.name}' is not a folder of mmchat weights: its {CONFIG} holds no settings.")
    if config.get("format_version") != FORMAT_VERSION:
        raise WeightsError(
            f"'{folder.name}' has format version {config.get('format_version')}; this mmchat reads {FORMAT_VERSION}."
        )
    return config


def _check_identity(config: dict, folder: Path, preset: Preset, any_encoder: bool) -> None:
    for key, expected in _identity(preset).items():
        if config.get(key) != expected and not (any_encoder and key in ("image_encoder", "image_features")):
            raise WeightsError(
                f"The weights in '{folder.name}' were made for {key.replace('_', ' ')} '{config.get(key)}', "
                f"but the preset '{preset.name}' has '{expected}'."
            )
