"""Image → features: the frozen image encoder in front of the projector."""

from __future__ import annotations

import logging
from math import isqrt, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import BadInput, WeightsError
from ..fetching import fetch
from ..fetching.sources import HubRepository
from ..presets import EFFICIENTNETS, ImageEncoderPreset, tuned_image_encoder
from .efficientnet import EfficientNet
from .llava_folder import IMAGE_ENCODER_NAMES, is_llava_folder, load_part, open_llava
from .onnx_export import build_image_encoder

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from transformers import BaseImageProcessor

logger = logging.getLogger(__name__)

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # either will do


class ImageEncoder(nn.Module):
    """A frozen network: pixels [batch, 3, height, width] → features [batch, feature_count, image_dim]."""

    def __init__(self, preset: ImageEncoderPreset):
        super().__init__()
        self.preset = preset

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """A decoded image → pixels [3, height, width]."""
        raise NotImplementedError

    def encode(self, images: list[Image.Image]) -> torch.Tensor:
        """Decoded images → features [len(images), feature_count, image_dim]."""
        return self.features([self.preprocess(image) for image in images])

    @torch.inference_mode()
    def features(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        """The pixels of images, each [3, height, width] → features [len(pixels), feature_count, image_dim].

        Images of the same shape are encoded together.
        """
        device = next(self.parameters(), torch.empty(0)).device  # none are left of a tuned encoder that was released
        found: dict[int, torch.Tensor] = {}
        for shape in {image.shape for image in pixels}:
            places = [place for place, image in enumerate(pixels) if image.shape == shape]
            batch = torch.stack([pixels[place] for place in places]).to(device)  # [batch, 3, height, width]
            found |= zip(places, self(batch), strict=True)
        return torch.stack([found[place] for place in range(len(pixels))])

    def release_network(self) -> None:
        """Frees the weights of which ONNX Runtime has a copy; most encoders need all of theirs."""

    @property
    def classifier(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the classification head: [classes, image_dim] and [classes].

        Raises:
            WeightsError: the encoder has no such head.
        """
        raise WeightsError(f"The image encoder {self.preset.title} has no classes.")


class EfficientNetLite(ImageEncoder):
    """EfficientNet-Lite (Tan & Le 2019, arXiv 1905.11946) trained on ImageNet and perhaps tuned on captions.

    The features are the last feature map, average-pooled to n × n cells in row order, and then its global average.
    """

    MEAN, STD = 127.0, 128.0  # of pixel values; TensorFlow's normalization
    STRIDE = 32  # pixels per cell of the last feature map
    LONGEST = 3  # times the resolution; a longer image is squeezed to that

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
        self.session = _onnx_session(self.network)
        self.network.to(memory_format=torch.channels_last)

    @property
    def classifier(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of ImageNet's head on the global average: [1000, image_dim] and [1000].

        Raises:
            WeightsError: a tuned encoder has no such head.
        """
        if not isinstance(self.network.classifier, nn.Linear):
            raise WeightsError("This image encoder was tuned on captions and no longer knows ImageNet's classes.")
        return self.network.classifier.weight, self.network.classifier.bias

    def release_network(self) -> None:
        """Leaves only the classifier if ONNX Runtime computes the features."""
        if self.session:
            self.network.stem = self.network.blocks = self.network.head = nn.Identity()

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Scales the whole image; for weights trained on squares, scales its shorter side and crops the center."""
        size = self.preset.resolution
        if self.preset.whole_image:
            scaled = image.resize(self._size_of(image), Image.Resampling.BICUBIC)
        else:
            scaled = ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
        values = torch.from_numpy(np.array(scaled)).permute(2, 0, 1)  # [3, height, width]
        return (values - self.MEAN) / self.STD

    def _size_of(self, image: Image.Image) -> tuple[int, int]:
        """Width and height in whole cells, with the proportions of the image and about resolution² pixels."""
        size = self.preset.resolution
        scale = size / sqrt(image.width * image.height)
        sides = (min(max(side * scale, size / self.LONGEST), size * self.LONGEST) for side in image.size)
        width, height = (round(side / self.STRIDE) * self.STRIDE for side in sides)
        return width, height

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        feature_maps = self._feature_maps(pixels)  # [batch, image_dim, height / STRIDE, width / STRIDE]
        side = isqrt(self.preset.feature_count - 1)
        cells = nn.functional.adaptive_avg_pool2d(feature_maps, side).flatten(2)  # [batch, image_dim, side²]
        global_average = feature_maps.mean(dim=(2, 3)).unsqueeze(2)  # [batch, image_dim, 1]
        return torch.cat([cells, global_average], dim=2).transpose(1, 2)  # [batch, feature_count, image_dim]

    def _feature_maps(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.session and pixels.device.type == "cpu":
            return torch.from_numpy(self.session.run(["maps"], {"pixels": pixels.numpy()})[0])
        return self.network(pixels.contiguous(memory_format=torch.channels_last))


def _onnx_session(network: EfficientNet) -> InferenceSession | None:
    """The network on ONNX Runtime, two to three times as fast as PyTorch on a CPU; None if that cannot run it."""
    try:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.enable_cpu_mem_arena = False  # it would keep the memory of the largest layers
        options.intra_op_num_threads = 1  # more threads gain little on small images; batches run images in parallel
        model = build_image_encoder(network)
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises many types; PyTorch is the fallback for all of them
        logger.warning("ONNX Runtime cannot run the image encoder; encoding with PyTorch, which is slower: %s", error)
        return None


def _load_tuned(network: EfficientNet, path: Path) -> None:
    network.classifier = nn.Identity()  # a tuned encoder has no head
    try:
        network.load_published(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise WeightsError(
            f"The image encoder in '{path.parent.name}' is missing, damaged or has another size."
        ) from error


class Clip(ImageEncoder):
    """The image encoder of a contrastive model.

    CLIP (Radford et al. 2021, arXiv 2103.00020) or SigLIP (Zhai et al. 2023, arXiv 2303.15343).
    """

    def __init__(self, preset: ImageEncoderPreset):
        from transformers import AutoConfig, CLIPVisionModelWithProjection, SiglipVisionModel

        super().__init__(preset)
        folder = fetch(preset.source)
        if is_llava_folder(folder):
            is_siglip, self.network = llava_image_encoder(folder, preset.name)
        else:
            is_siglip = AutoConfig.from_pretrained(folder).model_type.startswith("siglip")
            model_class = SiglipVisionModel if is_siglip else CLIPVisionModelWithProjection
            self.network = model_class.from_pretrained(folder, dtype=torch.float32)
        self.has_class_token = not is_siglip
        self.processor = load_image_processor(preset)
        self.requires_grad_(False).eval()

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        return self.processor(image, return_tensors="pt")["pixel_values"][0]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.preset.features == "pooled":
            output = self.network(pixels)  # one embedding per image → [batch, 1, image_dim]
            return (output.image_embeds if self.has_class_token else output.pooler_output)[:, None]
        states = self.network(pixels, output_hidden_states=True).hidden_states
        layers = self.preset.layer if isinstance(self.preset.layer, tuple) else (self.preset.layer,)
        patches = torch.cat([states[layer] for layer in layers], dim=-1)
        drops_first = self.preset.drops_patch or (self.has_class_token and not self.preset.class_token)
        return patches[:, 1:] if drops_first else patches  # [batch, feature_count, image_dim]

    @torch.inference_mode()
    def contrastive_embeddings(self, images: list[Image.Image]) -> torch.Tensor:
        """CLIP's image embeddings, [len(images), projection], comparable with its text embeddings.

        They do not depend on the preset's features.
        """
        pixels = torch.stack([self.preprocess(image) for image in images])  # [batch, 3, resolution, resolution]
        return self.network(pixels.to(self.network.device)).image_embeds


def load_image_processor(preset: ImageEncoderPreset) -> BaseImageProcessor:
    """The image processor that prepares pixels for CLIP or SigLIP.

    Raises:
        WeightsError: its file is missing or damaged.
    """
    from transformers import AutoImageProcessor

    folder = fetch(preset.source)
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil")  # needs no torchvision
    except Exception as error:  # transformers raises many types
        found = [name for name in PROCESSOR_FILES if (folder / name).exists()]
        file, trouble = (found[0], "damaged or incomplete") if found else (PROCESSOR_FILES[0], "missing")
        model = Path(preset.source.name).name
        raise WeightsError(f"The {file} of '{model}' is {trouble}: copy it from the model's origin.") from error


def llava_image_encoder(folder: Path, name: str) -> tuple[bool, nn.Module]:
    """Whether a LLaVA model's image encoder is SigLIP, and the encoder."""
    from transformers import CLIPVisionModel, SiglipVisionModel

    llava = open_llava(folder, name)
    config = llava.config.vision_config
    is_siglip = config.model_type.startswith("siglip")
    model_class = SiglipVisionModel if is_siglip else CLIPVisionModel
    return is_siglip, load_part(llava, model_class, config, IMAGE_ENCODER_NAMES, "image encoder", dtype=torch.float32)


def load_image_encoder(preset: ImageEncoderPreset) -> ImageEncoder:
    """Loads a preset's image encoder, frozen and in evaluation mode."""
    return EfficientNetLite(preset) if preset.features == "grid" else Clip(preset)


def find_image_encoder(
    repository: HubRepository, features: str = "patches", layer: int = -2, class_token: bool = False
) -> ImageEncoderPreset:
    """Describes an image encoder by its name.

    Args:
        repository: a CLIP or SigLIP model on the Hub or in a folder, a name from ``presets.EFFICIENTNETS``, or a folder
            with a tuned EfficientNet-Lite.
        features, layer, class_token: see ``ImageEncoderPreset``; features are "pooled" or "patches".

    Raises:
        AssetError: the model is not available.
        BadInput: the model is of another kind, or has no such layer.
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
        raise BadInput(f"{repository.name} is not a CLIP or SigLIP model. Name another one.")
    if not -config.num_hidden_layers <= layer + 1 <= config.num_hidden_layers + 1:
        raise BadInput(f"{repository.name} has {config.num_hidden_layers} layers; there is no layer {layer}.")
    if features == "pooled":
        count, image_dim = 1, config.hidden_size if is_siglip else config.projection_dim
    else:
        count = (config.image_size // config.patch_size) ** 2 + (class_token and not is_siglip)
        image_dim = config.hidden_size
    return ImageEncoderPreset(
        name=Path(repository.name).name,
        source=repository.absolute(),
        resolution=config.image_size,
        features=features,
        feature_count=count,
        image_dim=image_dim,
        layer=layer,
        class_token=class_token and not is_siglip,
    )
