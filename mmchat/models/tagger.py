"""Image tags: what two linear classifiers recognize in a picture's features, told to the language model in words.

Object tags beside image features help a language model name what it sees (Oscar, Li et al. 2020, arXiv 2004.06165).
One classifier is the head that the image encoder was trained with on ImageNet, the other knows words of captions and
labels.
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
MOST_CLASSES, MOST_WORDS = 2, 7  # shown to the language model: each costs it two or three tokens
LEAST_CLASS, LEAST_WORD = 0.1, 0.2  # the probability from which on a tag is shown


@dataclass(frozen=True)
class Tag:
    """A name for something in a picture, and how likely it is there, 0 to 1."""

    name: str
    probability: float


class Tagger(nn.Module):
    """Linear classifiers on the features that an EfficientNet-Lite gives of a picture.

    Its tensors are buffers: whatever is trained beside it, the tagger stays as it was fitted.

    Args:
        classes: ImageNet's 1,000, of which one is the main thing.
        words: of captions and labels, each there or not.
        width: numbers in a feature.
        fitted_to: whose features these are, as ``encoder_text`` tells it; empty where that is not known.
    """

    def __init__(self, classes: list[str], words: list[str], width: int, fitted_to: str = ""):
        super().__init__()
        self.classes, self.words, self.fitted_to = classes, words, fitted_to
        self.register_buffer("class_weight", torch.zeros(len(classes), width))
        self.register_buffer("class_bias", torch.zeros(len(classes)))
        self.register_buffer("word_weight", torch.zeros(len(words), 2 * width))
        self.register_buffer("word_bias", torch.zeros(len(words)))

    @torch.inference_mode()
    def forward(self, features: torch.Tensor) -> tuple[list[Tag], list[Tag]]:
        """The likeliest classes and words, likeliest first.

        Args:
            features: [features, width] of one picture, that of the whole picture last.
        """
        features = features.to(self.class_weight)
        classes = (self.class_weight @ features[-1] + self.class_bias).softmax(dim=0)  # [classes]
        words = (self.word_weight @ pooled(features[None])[0] + self.word_bias).sigmoid()  # [words]
        return (
            likeliest(self.classes, classes, MOST_CLASSES, LEAST_CLASS),
            likeliest(self.words, words, MOST_WORDS, LEAST_WORD),
        )

    def text(self, features: torch.Tensor) -> str:
        """The tags of a picture as the language model reads them."""
        return tag_text(*self(features))

    def save(self, folder: str | Path) -> None:
        """Writes TAGGER_FILE, in half precision."""
        names = {"classes": json.dumps(self.classes), "words": json.dumps(self.words)}
        names |= {"fitted_to": json.dumps(self.fitted_to)} if self.fitted_to else {}
        tensors = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, Path(folder) / TAGGER_FILE, names)


def load_tagger(folder: str | Path, encoder: ImageEncoderPreset) -> Tagger | None:
    """The tagger of a weights folder; None if it has none.

    Args:
        encoder: whose features it is to read.

    Raises:
        WeightsError: it is damaged, or was fitted to other features.
    """
    path = Path(folder) / TAGGER_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            names = {key: json.loads(value) for key, value in file.metadata().items()}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (it is no dict)
        tagger = Tagger(names["classes"], names["words"], tensors["class_weight"].shape[1], names.get("fitted_to", ""))
        tagger.load_state_dict(tensors)
    except (OSError, KeyError, AttributeError, ValueError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"The tagger in '{Path(folder).name}' is damaged.") from error
    _check_fits(tagger, encoder, Path(folder).name)
    return tagger


def encoder_text(encoder: ImageEncoderPreset) -> str:
    """The name of an image encoder and how its features are taken: taggers of another text do not fit it."""
    return f"{encoder.title}, {encoder.feature_kind}"


def _check_fits(tagger: Tagger, encoder: ImageEncoderPreset, folder: str) -> None:
    width = tagger.class_weight.shape[1]
    if tagger.fitted_to:
        fits, fitted_to = tagger.fitted_to == encoder_text(encoder), tagger.fitted_to
    else:  # early files do not tell
        fits, fitted_to = width == encoder.width, f"features of {width} numbers"
    if not fits:
        raise WeightsError(
            f"The tagger in '{folder}' was fitted to {fitted_to}, but the image encoder here is "
            f"{encoder_text(encoder)}; fit another one with fit_tagger.py."
        )


def pooled(features: torch.Tensor) -> torch.Tensor:
    """What words are recognized by: the mean and the largest over a picture.

    Args:
        features: [pictures, cells + 1, width].

    Returns:
        [pictures, 2 · width].
    """
    return torch.cat([features[:, -1], features[:, :-1].amax(dim=1)], dim=1)


def tag_text(classes: Iterable[Tag], words: Iterable[Tag]) -> str:
    """Tags as the language model reads them, with their probability in tenths: "Tags: espresso 9; cup 8, table 3"."""
    parts = [", ".join(f"{tag.name} {min(int(10 * tag.probability), 9)}" for tag in tags) for tags in (classes, words)]
    return f"Tags: {'; '.join(parts)}"


def likeliest(names: list[str], probabilities: torch.Tensor, most: int, least: float) -> list[Tag]:
    """At most so many tags, likeliest first, of at least that probability; ``probabilities`` is [names]."""
    values, order = probabilities.topk(min(most, len(names)))
    return [
        Tag(names[index], value) for value, index in zip(values.tolist(), order.tolist(), strict=True) if value >= least
    ]
