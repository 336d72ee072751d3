"""Picture → features: a frozen image encoder in front of the projector."""

from __future__ import annotations

import logging
from math import isqrt
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from .assets import fetch
from .errors import BadInput
from .presets import ImageEncoderPreset

logger = logging.getLogger(__name__)

MAX_PIXELS = 40_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def open_image(source: str | Path | BinaryIO) -> Image.Image:
    """Decodes a picture completely, as ``to_rgb`` gives it.

    Raises:
        BadInput: it is no picture, is damaged, or has more than ``MAX_PIXELS``.
    """
    too_large = BadInput(f"That picture is too large. Please send one of at most {MAX_PIXELS / 1e6:.0f} megapixels.")
    try:
        with Image.open(source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:  # checked on the header: decoding is what would fill the memory
                raise too_large
            image.load()
            return to_rgb(image)
    except BadInput:
        raise
    except FileNotFoundError as error:
        raise BadInput(f"There is no picture '{Path(source).name}'.") from error
    except Image.DecompressionBombError as error:
        raise too_large from error
    except Exception as error:  # decoders of damaged files raise almost anything
        raise BadInput("That file is not a picture I can read. Please send a JPEG, PNG or WebP.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded picture as people see it: RGB, upright as its EXIF data say, transparency on white."""
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # damaged EXIF data must not cost the picture
        logger.info("Unreadable EXIF data: %s", error)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        levels = np.asarray(image, dtype=np.float32)
        image = Image.fromarray((levels / max(levels.max(), 1.0) * 255).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class ImageEncoder(nn.Module):
    """A frozen network: pixels [batch, 3, resolution, resolution] → features [batch, feature_count, width]."""

    MEAN: tuple[float, ...]  # of the pixel values 0 to 255 it was trained on, for red, green and blue
    DEVIATION: tuple[float, ...]

    def __init__(self, preset: ImageEncoderPreset):
        super().__init__()
        self.preset = preset

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """A decoded picture → [3, resolution, resolution]: shorter side scaled, centre cut out, as CLIP does it."""
        size = self.preset.resolution
        square = ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
        values = torch.from_numpy(np.array(square)).permute(2, 0, 1)  # [3, size, size]
        mean, deviation = torch.tensor(self.MEAN), torch.tensor(self.DEVIATION)
        return (values - mean[:, None, None]) / deviation[:, None, None]

    @torch.inference_mode()
    def encode(self, images: list[Image.Image]) -> torch.Tensor:
        """Decoded pictures → features [len(images), feature_count, width]."""
        device = next(self.parameters()).device
        return self(torch.stack([self.pixels(image) for image in images]).to(device))


class EfficientNetLite(ImageEncoder):
    """EfficientNet-Lite (Tan & Le 2019, arXiv 1905.11946) trained on ImageNet.

    Gives the last convolution's map averaged to n × n cells, row by row, then its average over the whole picture.
    """

    MEAN, DEVIATION = (127.0,) * 3, (128.0,) * 3  # as the TensorFlow originals were trained

    def __init__(self, preset: ImageEncoderPreset):
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__(preset)
        (path,) = fetch([preset.source])
        self.network = EfficientNet.from_name(preset.name)
        self.network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        self.requires_grad_(False).eval()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        maps = self.network.extract_features(pixels)  # [batch, width, resolution / 32, resolution / 32]
        side = isqrt(self.preset.feature_count - 1)
        cells = nn.functional.adaptive_avg_pool2d(maps, side).flatten(2)  # [batch, width, side²]
        whole = maps.mean(dim=(2, 3)).unsqueeze(2)  # [batch, width, 1]
        return torch.cat([cells, whole], dim=2).transpose(1, 2)  # [batch, feature_count, width]


class Clip(ImageEncoder):
    """The image half of CLIP (Radford et al. 2021, arXiv 2103.00020)."""

    MEAN = (122.7709, 116.7460, 104.0937)
    DEVIATION = (68.5005, 66.6322, 70.3232)
    LAYER = -2  # whose patches are taken: the last one's only serve the pooled embedding (LLaVA, arXiv 2304.08485)

    def __init__(self, preset: ImageEncoderPreset):
        from transformers import CLIPVisionModelWithProjection

        super().__init__(preset)
        self.network = CLIPVisionModelWithProjection.from_pretrained(preset.source, dtype=torch.float32)
        self.requires_grad_(False).eval()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.preset.features == "pooled":
            return self.network(pixels).image_embeds[:, None]  # [batch, 1, width]
        states = self.network(pixels, output_hidden_states=True).hidden_states
        return states[self.LAYER][:, 1:]  # [batch, patches, width]: without the class token


def load_image_encoder(preset: ImageEncoderPreset) -> ImageEncoder:
    """The image encoder of a preset, frozen, in evaluation mode."""
    return EfficientNetLite(preset) if preset.features == "grid" else Clip(preset)
