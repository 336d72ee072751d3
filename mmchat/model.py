"""The multimodal model: a language model that reads projected picture features among its tokens."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .errors import WeightsError
from .language_model import load_adapter, load_language_model, save_adapter
from .presets import Preset
from .projector import ProjectorConfig, build_projector
from .prompt import IMAGE_TOKEN_ID

logger = logging.getLogger(__name__)

CONFIG = "mmchat.json"
PROJECTOR = "projector.safetensors"
ADAPTER = "adapter"
FORMAT_VERSION = 1
IGNORED = -100  # the label that transformers' losses leave out


class MultimodalModel(nn.Module):
    """A causal language model, a LoRA adapter on it, and a projector beside it.

    The projector is a plain module outside PEFT, which freezes what it does not know.
    """

    def __init__(self, language_model: nn.Module, projector: nn.Module, projector_config: ProjectorConfig):
        super().__init__()
        self.language_model = language_model
        self.projector = projector
        self.projector_config = projector_config

    @property
    def device(self) -> torch.device:
        return next(self.projector.parameters()).device

    def without_adapter(self):
        """A context in which the base model speaks alone."""
        disable = getattr(self.language_model, "disable_adapter", None)
        return disable() if disable else nullcontext()

    def splice(self, token_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        """Token ids with pictures in their places → input embeddings.

        Args:
            token_ids: [batch, length], IMAGE_TOKEN_ID where a picture's feature goes.
            image_features: [images, features, image_width] in reading order, or None where there is no picture.

        Returns:
            [batch, length, token_width] in the language model's number format.

        Raises:
            ValueError: the number of places and the number of features differ.
        """
        is_image = token_ids == IMAGE_TOKEN_ID  # [batch, length]
        embeddings = self.language_model.get_input_embeddings()(token_ids.masked_fill(is_image, 0))
        feature_count = 0 if image_features is None else image_features.shape[0] * image_features.shape[1]
        if int(is_image.sum()) != feature_count:
            raise ValueError(f"{int(is_image.sum())} places for picture features, but {feature_count} features")
        if feature_count == 0:
            return embeddings
        projector_dtype = next(self.projector.parameters()).dtype
        image_tokens = self.projector(image_features.to(projector_dtype))  # [images, features, token_width]
        return embeddings.masked_scatter(is_image.unsqueeze(-1), image_tokens.to(embeddings.dtype))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        image_features: torch.Tensor | None = None,
        **loss_options,
    ):
        """The training loss. ``labels`` stand where their tokens stand: the language model's own loss shifts them.

        Args:
            input_ids, attention_mask, labels: [batch, length], padded on the right.
            image_features: [images, features, image_width], or None.
        """
        # Logits are the costliest part of a small model: compute them only from one token before the first label on.
        first_label = int((labels != IGNORED).any(dim=0).nonzero()[0])
        kept = labels.shape[1] - max(first_label - 1, 0)
        return self.language_model(
            inputs_embeds=self.splice(input_ids, image_features),
            attention_mask=attention_mask,
            labels=labels[:, -kept:],
            logits_to_keep=kept,
            **loss_options,
        )

    def save(self, folder: str | Path, preset: Preset, dtype: torch.dtype | None = None) -> None:
        """Writes a folder that chats: mmchat.json, projector.safetensors, adapter/.

        Args:
            dtype: the number format on disk; the weights' own if None.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.projector.state_dict()
        save_file(
            {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in state.items()}, folder / PROJECTOR
        )
        save_adapter(self.language_model, folder / ADAPTER, dtype)
        config = {
            "format_version": FORMAT_VERSION,
            **_identity(preset),
            "projector": asdict(self.projector_config),
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _identity(preset: Preset) -> dict:
    """What weights were trained for; weights of another identity are refused."""
    encoder = preset.image_encoder
    return {
        "language_model": preset.language_model.name,
        "chat_format": preset.language_model.chat_format,
        "image_encoder": encoder.name,
        "image_features": f"{encoder.feature_count}x{encoder.width}",
    }


def load_model(
    preset: Preset, weights: str | Path, dtype: torch.dtype, *, trainable: bool = False
) -> tuple[MultimodalModel, object]:
    """The multimodal model of a preset with the projector and adapter of a weights folder, and its tokenizer.

    Raises:
        WeightsError: the folder is no weights folder, or was made for other models.
        AssetError: the base model could not be fetched.
    """
    folder = Path(weights)
    config = _read_config(folder, preset)
    projector_config = ProjectorConfig(**config["projector"])
    projector = build_projector(projector_config)
    try:
        projector.load_state_dict(load_file(folder / PROJECTOR))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"The projector in '{folder.name}' is missing, damaged or of another size.") from error
    language_model, tokenizer = load_language_model(preset.language_model, dtype)
    if projector_config.token_width != language_model.config.hidden_size:
        raise WeightsError(f"The projector in '{folder.name}' makes tokens of another width than the model reads.")
    language_model = load_adapter(language_model, folder / ADAPTER, trainable=trainable)
    model = MultimodalModel(language_model, projector.float().requires_grad_(trainable), projector_config)
    return model.train(trainable), tokenizer


def _read_config(folder: Path, preset: Preset) -> dict:
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"'{folder.name}' is not a folder of mmchat weights: it has no readable {CONFIG}."
        ) from error
    if config.get("format_version") != FORMAT_VERSION:
        raise WeightsError(
            f"'{folder.name}' has format version {config.get('format_version')}; this mmchat reads {FORMAT_VERSION}."
        )
    for key, expected in _identity(preset).items():
        if config.get(key) != expected:
            raise WeightsError(
                f"The weights in '{folder.name}' were made for {key.replace('_', ' ')} '{config.get(key)}', "
                f"but the preset '{preset.name}' has '{expected}'."
            )
    return config
