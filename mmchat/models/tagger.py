"""Image tags: two linear classifiers name what is in an image, and the language model reads the tags as text.

Object tags beside image features help a language model name what it sees (Oscar, Li et al. 2020, arXiv 2004.06165).
One classifier is the image encoder's own ImageNet head; the other predicts words of captions and labels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..errors import WeightsError
from ..presets import ImageEncoderPreset

TAGGER_FILE = "tagger.safetensors"  # in a weights folder
MAX_CLASSES, MAX_WORDS = 2, 7  # tags per image in the prompt; each takes two or three tokens
MIN_CLASS_PROBABILITY, MIN_WORD_PROBABILITY = 0.1, 0.2  # less likely tags are left out


@dataclass(frozen=True)
class Tag:
    """A name for something in an image, and its probability, 0 to 1."""

    name: str
    probability: float


class Tagger(nn.Module):
    """Linear classifiers on the features of an EfficientNet-Lite.

    The tensors are buffers, so training the model leaves the tagger unchanged.

    Args:
        classes: ImageNet's 1,000 class names; exactly one applies (softmax).
        words: words of captions and labels; any number apply (sigmoid).
        image_dim: size of one feature vector.
        fitted_to: the ``fingerprint_text`` of the encoder whose features it reads; empty if unknown.
    """

    def __init__(self, classes: list[str], words: list[str], image_dim: int, fitted_to: str = ""):
        super().__init__()
        self.classes, self.words, self.fitted_to = classes, words, fitted_to
        self.register_buffer("class_weight", torch.zeros(len(classes), image_dim))
        self.register_buffer("class_bias", torch.zeros(len(classes)))
        self.register_buffer("word_weight", torch.zeros(len(words), 2 * image_dim))
        self.register_buffer("word_bias", torch.zeros(len(words)))

    @torch.inference_mode()
    def forward(self, features: torch.Tensor) -> tuple[list[Tag], list[Tag]]:
        """The most likely classes and words, the best first.

        Args:
            features: [features, image_dim] of one image; the global average is last.
        """
        features = features.to(self.class_weight)
        classes = (self.class_weight @ features[-1] + self.class_bias).softmax(dim=0)  # [classes]
        words = (self.word_weight @ pooled(features[None])[0] + self.word_bias).sigmoid()  # [words]
        return (
            top_tags(self.classes, classes, MAX_CLASSES, MIN_CLASS_PROBABILITY),
            top_tags(self.words, words, MAX_WORDS, MIN_WORD_PROBABILITY),
        )

    def text(self, features: torch.Tensor) -> str:
        """The tags of an image as the language model reads them."""
        return tag_text(*self(features))

    def save(self, folder: str | Path) -> None:
        """Writes TAGGER_FILE in half precision."""
        names = {"classes": json.dumps(self.classes), "words": json.dumps(self.words)}
        names |= {"fitted_to": json.dumps(self.fitted_to)} if self.fitted_to else {}
        tensors = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, Path(folder) / TAGGER_FILE, names)


def load_tagger(folder: str | Path, encoder: ImageEncoderPreset) -> Tagger | None:
    """Loads the tagger of a weights folder; None if the folder has none.

    Args:
        encoder: the image encoder whose features it will read.

    Raises:
        WeightsError: the tagger is damaged, or was fitted to other features.
    """
    path = Path(folder) / TAGGER_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            names = {key: json.loads(value) for key, value in file.metadata().items()}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dict)
        tagger = Tagger(names["classes"], names["words"], tensors["class_weight"].shape[1], names.get("fitted_to", ""))
        tagger.load_state_dict(tensors)
    except (OSError, KeyError, AttributeError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"The tagger in '{Path(folder).name}' is damaged.") from error
    _check_fits(tagger, encoder, Path(folder).name)
    return tagger


def fingerprint_text(encoder: ImageEncoderPreset) -> str:
    """An image encoder and its features as text; a tagger fits only the encoder with the same text."""
    return f"{encoder.title}, {encoder.feature_kind}"


def _check_fits(tagger: Tagger, encoder: ImageEncoderPreset, folder: str) -> None:
    image_dim = tagger.class_weight.shape[1]
    if tagger.fitted_to:
        fits, fitted_to = tagger.fitted_to == fingerprint_text(encoder), tagger.fitted_to
    else:  # older files do not record it
        fits, fitted_to = image_dim == encoder.image_dim, f"features of size {image_dim}"
    if not fits:
        raise WeightsError(
            f"The tagger in '{folder}' was fitted to {fitted_to}, but the image encoder here is "
            f"{fingerprint_text(encoder)}. Fit another one with fit_tagger.py."
        )


def pooled(features: torch.Tensor) -> torch.Tensor:
    """Mean and max pooling over the cells of an image: the input of the word classifier.

    Args:
        features: [images, cells + 1, image_dim].

    Returns:
        [images, 2 · image_dim].
    """
    return torch.cat([features[:, -1], features[:, :-1].amax(dim=1)], dim=1)


def tag_text(classes: Iterable[Tag], words: Iterable[Tag]) -> str:
    """Tags as the language model reads them, with probabilities in tenths: "Tags: espresso 9; cup 8, table 3"."""
    parts = [", ".join(f"{tag.name} {min(int(10 * tag.probability), 9)}" for tag in tags) for tags in (classes, words)]
    return f"Tags: {'; '.join(parts)}"


def top_tags(names: list[str], probabilities: torch.Tensor, limit: int, threshold: float) -> list[Tag]:
    """At most ``limit`` tags of at least ``threshold``, the best first; ``probabilities`` is [names]."""
    values, order = probabilities.topk(min(limit, len(names)))
    return [
        Tag(names[index], value)
        for value, index in zip(values.tolist(), order.tolist(), strict=True)
        if value >= threshold
    ]
