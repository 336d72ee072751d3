"""Picture → features: a frozen image encoder in front of the projector."""

from __future__ import annotations

import logging
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import BadInput, WeightsError
from ..fetching import fetch
from ..presets import EFFICIENTNETS, HubRepository, ImageEncoderPreset, tuned_image_encoder
from .efficientnet import EfficientNet

logger = logging.getLogger(__name__)


class ImageEncoder(nn.Module):
    """A frozen network: pixels [batch, 3, resolution, resolution] → features [batch, feature_count, width]."""

    def __init__(self, preset: ImageEncoderPreset):
        super().__init__()
        self.preset = preset

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """A decoded picture → [3, resolution, resolution], as the network was trained to see it."""
        raise NotImplementedError

    @torch.inference_mode()
    def encode(self, images: list[Image.Image]) -> torch.Tensor:
        """Decoded pictures → features [len(images), feature_count, width]."""
        return self(self._batch(images))

    def _batch(self, images: list[Image.Image]) -> torch.Tensor:
        device = next(self.parameters()).device
        return torch.stack([self.pixels(image) for image in images]).to(device)  # [batch, 3, resolution, resolution]

    @property
    def classifier(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer that tells classes from the feature of the whole picture: [classes, width] and [classes].

        Raises:
            WeightsError: the encoder has none.
        """
        raise WeightsError(f"The image encoder {self.preset.title} was trained on no classes.")


class EfficientNetLite(ImageEncoder):
    """EfficientNet-Lite (Tan & Le 2019, arXiv 1905.11946) trained on ImageNet, or tuned from there on captions.

    Gives the last convolution's map averaged to n × n cells, row by row, then its average over the whole picture.
    """

    MEAN, DEVIATION = 127.0, 128.0  # of pixel values, as the TensorFlow originals were trained

    def __init__(self, preset: ImageEncoderPreset):
        super().__init__(preset)
        self.network = EfficientNet(preset.name)
        path = fetch(preset.source)
        if not preset.is_tuned:
            self.network.load_published(torch.load(path, weights_only=True, map_location="cpu"))
        self.requires_grad_(False).eval()
        self.network.fold_norms()
        if preset.is_tuned:
            _load_tuned(self.network, path)
        self._session = _on_onnx_runtime(self.network, preset.resolution)
        self.network.to(memory_format=torch.channels_last)

    @property
    def classifier(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer that tells ImageNet's classes from the feature of the whole picture: [1000, width] and [1000].

        Raises:
            WeightsError: the encoder was tuned, and has lost it.
        """
        if not isinstance(self.network.classifier, nn.Linear):
            raise WeightsError("This image encoder was tuned on words and no longer knows ImageNet's classes.")
        return self.network.classifier.weight, self.network.classifier.bias

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """Shorter side scaled, centre cut out."""
        size = self.preset.resolution
        square = ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
        values = torch.from_numpy(np.array(square)).permute(2, 0, 1)  # [3, size, size]
        return (values - self.MEAN) / self.DEVIATION

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        maps = self._maps(pixels)  # [batch, width, resolution / 32, resolution / 32]
        side = isqrt(self.preset.feature_count - 1)
        cells = nn.functional.adaptive_avg_pool2d(maps, side).flatten(2)  # [batch, width, side²]
        whole = maps.mean(dim=(2, 3)).unsqueeze(2)  # [batch, width, 1]
        return torch.cat([cells, whole], dim=2).transpose(1, 2)  # [batch, feature_count, width]

    def _maps(self, pixels: torch.Tensor) -> torch.Tensor:
        if self._session and pixels.device.type == "cpu":
            return torch.from_numpy(self._session.run(["maps"], {"pixels": pixels.numpy()})[0])
        return self.network(pixels.contiguous(memory_format=torch.channels_last))


def _on_onnx_runtime(network: EfficientNet, resolution: int) -> Any:
    """The convolutions where a CPU does them two to three times as fast as PyTorch; None where that cannot be had."""
    try:
        import onnxruntime

        from ..inference.onnx_graph import build_image_encoder

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # more gain little on small pictures; many pictures go side by side
        model = build_image_encoder(network, resolution)
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own come in many kinds; whatever it is, PyTorch can do the work
        logger.warning("Pictures are read by PyTorch, which is slower: %s", error)
        return None


def _load_tuned(network: EfficientNet, path: Path) -> None:
    network.classifier = nn.Identity()  # captions have no classes
    try:
        network.load_published(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"The image encoder in '{path.parent.name}' is missing, damaged or another one.") from error


class Clip(ImageEncoder):
    """The image half of CLIP (Radford et al. 2021, arXiv 2103.00020) or SigLIP (Zhai et al. 2023, arXiv 2303.15343)."""

    def __init__(self, preset: ImageEncoderPreset):
        from transformers import AutoConfig, AutoImageProcessor, CLIPVisionModelWithProjection, SiglipVisionModel

        super().__init__(preset)
        folder = fetch(preset.source)
        is_siglip = AutoConfig.from_pretrained(folder).model_type.startswith("siglip")
        model_class = SiglipVisionModel if is_siglip else CLIPVisionModelWithProjection
        self.network = model_class.from_pretrained(folder, dtype=torch.float32)
        self.has_class_token = not is_siglip
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")  # as torchvision, without it
        self.requires_grad_(False).eval()

    def pixels(self, image: Image.Image) -> torch.Tensor:
        return self.processor(image, return_tensors="pt")["pixel_values"][0]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.preset.features == "pooled":
            output = self.network(pixels)
            return (output.image_embeds if self.has_class_token else output.pooler_output)[:, None]  # [batch, 1, width]
        patches = self.network(pixels, output_hidden_states=True).hidden_states[self.preset.layer]
        drops_first = self.has_class_token and not self.preset.class_token
        return patches[:, 1:] if drops_first else patches  # [batch, feature_count, width]

    @torch.inference_mode()
    def embed(self, images: list[Image.Image]) -> torch.Tensor:
        """CLIP's embeddings of decoded pictures, [len(images), projection], which it compares with those of texts.

        They are the projected class token of the last layer, whichever features the preset takes.
        """
        return self.network(self._batch(images)).image_embeds


def load_image_encoder(preset: ImageEncoderPreset) -> ImageEncoder:
    """The image encoder of a preset, frozen, in evaluation mode."""
    return EfficientNetLite(preset) if preset.features == "grid" else Clip(preset)


def find_image_encoder(
    repository: HubRepository, features: str = "patches", layer: int = -2, class_token: bool = False
) -> ImageEncoderPreset:
    """Any CLIP or SigLIP vision model of the Hub, or in a folder, as a preset's image encoder.

    Or one of ``presets.EFFICIENTNETS`` by its name, as it was trained on ImageNet; or a folder with one that was tuned
    on captions.

    Args:
        features, layer, class_token: as ``ImageEncoderPreset`` has them; the features are "pooled" or "patches".

    Raises:
        AssetError: it cannot be had.
        BadInput: it is no such model, or has no such layer.
    """
    from transformers import AutoConfig

    if repository.name in EFFICIENTNETS:
        return EFFICIENTNETS[repository.name]
    if tuned := tuned_image_encoder(repository.name):
        return tuned
    config = AutoConfig.from_pretrained(fetch(repository))
    config = getattr(config, "vision_config", config)
    is_siglip = config.model_type.startswith("siglip")
    if not is_siglip and not config.model_type.startswith("clip"):
        raise BadInput(f"{repository.name} is no CLIP or SigLIP model.")
    if not -config.num_hidden_layers <= layer + 1 <= config.num_hidden_layers + 1:
        raise BadInput(f"{repository.name} has {config.num_hidden_layers} layers; there is no layer {layer}.")
    if features == "pooled":
        count, width = 1, config.hidden_size if is_siglip else config.projection_dim
    else:
        count = (config.image_size // config.patch_size) ** 2 + (class_token and not is_siglip)
        width = config.hidden_size
    return ImageEncoderPreset(
        name=Path(repository.name).name,
        source=repository,
        resolution=config.image_size,
        features=features,
        feature_count=count,
        width=width,
        layer=layer,
        class_token=class_token and not is_siglip,
    )
