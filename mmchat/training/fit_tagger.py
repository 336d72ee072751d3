"""Fits the tagger to captioned and labeled pictures.

This is multi-label classification with partial labels: a list of furniture says nothing about colors. Words that a
source covers are known to be present or absent. All others are weak negatives: absent, with a small loss weight.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..errors import BadInput
from ..models.tagger import Tag, Tagger, fingerprint_text, pooled, tag_text
from ..presets import ImageEncoderPreset
from .data.labels import Labeled
from .data.packing import Features
from .data.questions import AGREEMENT
from .tune_image_encoder import words_and_pairs

logger = logging.getLogger(__name__)

TAGS_FILE = "tags.json"  # picture → its out-of-fold tags
MIN_WORD_PICTURES, MIN_LABEL_PICTURES = 15, 3  # pictures that must show a caption word, or a label, to include it
WEAK_NEGATIVE = 0.15  # loss weight of words that no source covers; at 0, the tagger would predict doorknobs in the snow
FOLDS = 4
EPOCHS, MIN_STEPS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 10, 500, 256, 2e-3, 0.3, 0.4
DROP_ALL, DROP_ONE = 0.1, 0.15  # probability that training drops all tags of a picture, or one of them


@dataclass
class PictureLabels:
    """The partial labels of one picture."""

    targets: dict[str, float] = field(default_factory=dict)  # word → soft label, 0 to 1
    vocabularies: set[str] = field(default_factory=set)  # the vocabularies whose other words are known to be absent


def read_classes(path: str | Path) -> list[str]:
    """The first name of each of an encoder's classes, in the order of the classifier's outputs.

    Args:
        path: a JSON list of ``{"names": [name, …]}``.

    Raises:
        BadInput: the file is unreadable or has another format.
    """
    path = Path(path)
    try:
        return [entry["names"][0] for entry in json.loads(path.read_text(encoding="utf-8"))]
    except OSError as error:
        raise BadInput(f"{path.name} cannot be read: {error.strerror}.") from error
    except (ValueError, LookupError, TypeError) as error:
        raise BadInput(f'{path.name} must be a list of classes, each {{"names": [name, …]}}.') from error


class Vocabulary:
    """The words to recognize, and the partial labels of each picture.

    Args:
        captioned: ``{"image": name, "captions": [text, …]}``.
        labeled: pictures with objects, a label, a scene or questions.

    Raises:
        BadInput: no word occurs in enough pictures.
    """

    def __init__(self, captioned: Sequence[dict], labeled: Sequence[Labeled]):
        self.known: dict[str, PictureLabels] = {}
        self._words: dict[str, Counter] = {}  # vocabulary → word → number of pictures
        for picture in captioned:
            said = Counter(word for caption in picture["captions"] for word in words_and_pairs(caption))
            agreed = {word: count for word, count in said.items() if count >= AGREEMENT}
            self._add(picture["image"], "captions", {w: n / len(picture["captions"]) for w, n in said.items()}, agreed)
        for picture in labeled:
            self._add_labeled(picture)
        self.words = sorted(
            {
                word
                for vocabulary, counts in self._words.items()
                for word, count in counts.items()
                if count >= (MIN_WORD_PICTURES if vocabulary in ("captions", "answers") else MIN_LABEL_PICTURES)
            }
        )
        if not self.words:
            raise BadInput("No word occurs in enough pictures to be learned: there are too few pictures.")

    def _add_labeled(self, picture: Labeled) -> None:
        if picture.objects:
            self._add(picture.image, f"objects of {picture.group}", dict.fromkeys(picture.objects, 1.0))
        if picture.label:
            self._add(picture.image, "labels", dict.fromkeys(filter(None, (picture.label, picture.fine.lower())), 1.0))
            self.known[picture.image].vocabularies.add("scenes")
        if picture.scene:
            self._add(picture.image, "scenes", {picture.scene: 1.0})
        things = [thing.strip() for _, answer in picture.questions for thing in answer.split(",")]
        if answers := {thing: 1.0 for thing in things if not thing.isdigit()}:
            self._add(picture.image, "answers", answers)

    def _add(self, image: str, vocabulary: str, targets: dict[str, float], counted: dict | None = None) -> None:
        known = self.known.setdefault(image, PictureLabels())
        known.vocabularies.add(vocabulary)
        if vocabulary == "captions":
            known.vocabularies.add("scenes")
        for word, target in targets.items():
            known.targets[word] = max(known.targets.get(word, 0.0), target)
        self._words.setdefault(vocabulary, Counter()).update((targets if counted is None else counted).keys())

    def targets(self, images: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Soft labels, and their loss weights, 1 where the label is known: [images, words] each."""
        index_of = {word: index for index, word in enumerate(self.words)}
        members = {
            name: torch.tensor([word in counts for word in self.words]) for name, counts in self._words.items()
        }  # [words] each
        targets = torch.zeros(len(images), len(self.words))
        weights = torch.full_like(targets, WEAK_NEGATIVE)
        for row, image in enumerate(images):
            known = self.known[image]
            for vocabulary in known.vocabularies & members.keys():
                weights[row][members[vocabulary]] = 1
            for word, target in known.targets.items():
                if word in index_of:
                    targets[row, index_of[word]], weights[row, index_of[word]] = target, 1
        return targets, weights


def fit_words(x: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, seed: int) -> nn.Linear:
    """Fits a logistic regression per word on pooled features, with AdamW and dropout.

    Args:
        x: features from ``pooled``, [pictures, 2 · image_dim].
        targets, weights: from ``Vocabulary.targets``, [pictures, words].
    """
    torch.manual_seed(seed)
    mean, deviation = x.mean(dim=0), x.std(dim=0) + 1e-6
    x = (x - mean) / deviation
    layer = nn.Linear(x.shape[1], targets.shape[1])
    nn.init.zeros_(layer.weight)
    frequency = (targets * weights).sum(dim=0) / weights.sum(dim=0).clamp(min=1)  # [words]
    layer.bias.data = torch.logit(frequency, eps=1e-3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    epochs = max(EPOCHS, MIN_STEPS * BATCH_SIZE // len(x))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH_SIZE):
            logits = layer(nn.functional.dropout(x[batch], DROPOUT))  # [batch, words]
            losses = nn.functional.binary_cross_entropy_with_logits(logits, targets[batch], reduction="none")
            optimizer.zero_grad()
            (losses * weights[batch]).sum(dim=1).mean().backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():  # fold the standardization of x into the layer
        layer.weight /= deviation
        layer.bias -= layer.weight @ mean
    return layer


def fit_tagger(
    encoder: ImageEncoderPreset,
    head: tuple[torch.Tensor, torch.Tensor],
    classes: list[str],
    vocabulary: Vocabulary,
    features: Features,
    out: Path,
    seed: int = 0,
) -> Tagger:
    """Fits the words, copies the encoder's own classes, and writes the tagger and TAGS_FILE to ``out``.

    A classifier is overconfident on its own training pictures, and a language model trained on such tags would trust
    tags too much. So the tags in TAGS_FILE are out-of-fold: they come from a classifier fitted to the other folds.

    Args:
        head: weight and bias of the encoder's own classifier, [classes, image_dim] and [classes].
    """
    images = [image for image in sorted(vocabulary.known) if image in features]
    logger.info("Fitting %d words on %d pictures", len(vocabulary.words), len(images))
    maps = torch.stack([features[image].float() for image in images])  # [pictures, features, image_dim]
    x = pooled(maps)  # [pictures, 2 · image_dim]
    targets, weights = vocabulary.targets(images)

    def tagger_of(chosen: torch.Tensor) -> Tagger:
        layer = fit_words(x[chosen], targets[chosen], weights[chosen], seed)
        tagger = Tagger(classes, vocabulary.words, encoder.image_dim, fingerprint_text(encoder))
        layers = (*head, layer.weight.detach(), layer.bias.detach())
        tagger.load_state_dict(dict(zip(tagger.state_dict(), layers, strict=True)))
        return tagger

    fold = torch.tensor([random.Random(f"{seed} {image}").randrange(FOLDS) for image in images])
    tags: dict[str, list] = {}
    for held_out in range(FOLDS):
        tagger = tagger_of(fold != held_out)
        for index in (fold == held_out).nonzero()[:, 0].tolist():
            tags[images[index]] = [
                [[tag.name, round(tag.probability, 3)] for tag in part] for part in tagger(maps[index])
            ]
    out.mkdir(parents=True, exist_ok=True)
    (out / TAGS_FILE).write_text(json.dumps(tags))
    tagger = tagger_of(torch.ones(len(images), dtype=torch.bool))
    tagger.save(out)
    return tagger


class TrainingTags:
    """Out-of-fold tags for training, with random dropout so that the language model keeps looking at the picture.

    Args:
        tagger: tags the pictures that are not in TAGS_FILE.
        folder: may hold TAGS_FILE.
        features: the features of every picture.
    """

    def __init__(self, tagger: Tagger, folder: Path, features: Features, seed: int):
        self.tagger, self.features, self.seed = tagger, features, seed
        path = folder / TAGS_FILE
        self.tags = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, image: str) -> str:
        """The tag text of a picture in the prompt; deterministic, so that a resumed run is exact."""
        random_numbers = random.Random(f"{self.seed} {image}")
        if random_numbers.random() < DROP_ALL:
            return tag_text([], [])
        if image in self.tags:
            parts = [[Tag(*pair) for pair in part] for part in self.tags[image]]
        else:
            parts = self.tagger(self.features[image])
        return tag_text(*([tag for tag in part if random_numbers.random() >= DROP_ONE] for part in parts))
