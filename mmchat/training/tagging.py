"""Fits a tagger to pictures that people described or labeled.

Each source tells only part of what a picture shows: a list of furniture says nothing about colors. So some words are
known to be there or not, and the others, which nobody looked for, are taken to be absent and count less.
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
from ..models.tagger import Tag, Tagger, encoder_text, pooled, tag_text
from ..presets import ImageEncoderPreset
from .data.labels import Labeled
from .data.packing import Features
from .data.questions import AGREEMENT
from .tuning import words_and_pairs

logger = logging.getLogger(__name__)

TAGS_FILE = "tags.json"  # picture -> the tags of a tagger that has not seen it
COMMON_WORD, COMMON_LABEL = 15, 3  # pictures that have to show it: words that people chose, labels
UNKNOWN = 0.15  # what a word counts where it was not looked for; at 0 the tagger would see door knobs in the snow
FOLDS = 4
EPOCHS, LEAST_STEPS, BATCH, RATE, DECAY, DROPOUT = 10, 500, 256, 2e-3, 0.3, 0.4
LEAVE_OUT_ALL, LEAVE_OUT_ONE = 0.1, 0.15  # in training: of pictures without tags, of tags left out of the others


@dataclass
class Known:
    """What is known of one picture."""

    shares: dict[str, float] = field(default_factory=dict)  # word -> how sure it is, 0 to 1
    vocabularies: set[str] = field(default_factory=set)  # whose other words are known not to be there


def read_classes(path: str | Path) -> list[str]:
    """The names of an encoder's classes, the first of each, in the order of the classifier's outputs.

    Args:
        path: a JSON list of ``{"names": [name, …]}``.

    Raises:
        BadInput: it cannot be read, or is no such list.
    """
    path = Path(path)
    try:
        return [entry["names"][0] for entry in json.loads(path.read_text(encoding="utf-8"))]
    except OSError as error:
        raise BadInput(f"{path.name} cannot be read: {error.strerror}.") from error
    except (ValueError, LookupError, TypeError) as error:
        raise BadInput(f'{path.name} is no list of classes, each {{"names": [name, …]}}.') from error


class Vocabulary:
    """Words to recognize, and what is known of each picture.

    Args:
        captioned: ``{"image": name, "captions": [text, …]}``.
        labeled: pictures with objects, a label, a scene or questions.
    """

    def __init__(self, captioned: Sequence[dict], labeled: Sequence[Labeled]):
        self.known: dict[str, Known] = {}
        self._words: dict[str, Counter] = {}  # vocabulary -> word -> pictures
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
                if count >= (COMMON_WORD if vocabulary in ("captions", "answers") else COMMON_LABEL)
            }
        )
        if not self.words:
            raise BadInput("No word is common to enough pictures to be learned; these are too few.")

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

    def _add(self, image: str, vocabulary: str, shares: dict[str, float], counted: dict | None = None) -> None:
        known = self.known.setdefault(image, Known())
        known.vocabularies.add(vocabulary)
        if vocabulary == "captions":
            known.vocabularies.add("scenes")
        for word, share in shares.items():
            known.shares[word] = max(known.shares.get(word, 0.0), share)
        self._words.setdefault(vocabulary, Counter()).update((shares if counted is None else counted).keys())

    def targets(self, images: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """How sure each word is, and what that counts, 1 where it is known: [images, words] each."""
        number = {word: index for index, word in enumerate(self.words)}
        members = {
            name: torch.tensor([word in counts for word in self.words]) for name, counts in self._words.items()
        }  # [words] each
        shares = torch.zeros(len(images), len(self.words))
        weights = torch.full_like(shares, UNKNOWN)
        for row, image in enumerate(images):
            known = self.known[image]
            for vocabulary in known.vocabularies & members.keys():
                weights[row][members[vocabulary]] = 1
            for word, share in known.shares.items():
                if word in number:
                    shares[row, number[word]], weights[row, number[word]] = share, 1
        return shares, weights


def fit_words(x: torch.Tensor, shares: torch.Tensor, weights: torch.Tensor, seed: int) -> nn.Linear:
    """Logistic regression of each word on what ``pooled`` gives, trained by AdamW with dropout.

    Args:
        x: [pictures, 2 · width].
        shares, weights: as ``Vocabulary.targets`` gives them.
    """
    torch.manual_seed(seed)
    mean, deviation = x.mean(dim=0), x.std(dim=0) + 1e-6
    x = (x - mean) / deviation
    layer = nn.Linear(x.shape[1], shares.shape[1])
    nn.init.zeros_(layer.weight)
    rate = (shares * weights).sum(dim=0) / weights.sum(dim=0).clamp(min=1)
    layer.bias.data = torch.logit(rate, eps=1e-3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=RATE, weight_decay=DECAY)
    epochs = max(EPOCHS, LEAST_STEPS * BATCH // len(x))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            logits = layer(nn.functional.dropout(x[batch], DROPOUT))
            losses = nn.functional.binary_cross_entropy_with_logits(logits, shares[batch], reduction="none")
            optimizer.zero_grad()
            (losses * weights[batch]).sum(dim=1).mean().backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():  # what x was shifted and scaled by goes into the layer
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
    """Fits the words, takes over the encoder's classes, and writes both to ``out``, with TAGS_FILE beside them.

    A classifier is too sure of the pictures it was fitted to, and a language model that learned from such tags would
    trust tags too much. So the tags of each training picture come from a classifier that was fitted to the others.

    Args:
        head: the encoder's own classifier, [classes, width] and [classes].
    """
    images = [image for image in sorted(vocabulary.known) if image in features]
    logger.info("%d pictures and %d words to learn from", len(images), len(vocabulary.words))
    whole = torch.stack([features[image].float() for image in images])  # [pictures, features, width]
    x = pooled(whole)
    shares, weights = vocabulary.targets(images)

    def tagger_of(chosen: torch.Tensor) -> Tagger:
        layer = fit_words(x[chosen], shares[chosen], weights[chosen], seed)
        tagger = Tagger(classes, vocabulary.words, encoder.image_dim, encoder_text(encoder))
        layers = (*head, layer.weight.detach(), layer.bias.detach())
        tagger.load_state_dict(dict(zip(tagger.state_dict(), layers, strict=True)))
        return tagger

    fold = torch.tensor([random.Random(f"{seed} {image}").randrange(FOLDS) for image in images])
    tags: dict[str, list] = {}
    for number in range(FOLDS):
        tagger = tagger_of(fold != number)
        for index in (fold == number).nonzero()[:, 0].tolist():
            tags[images[index]] = [
                [[tag.name, round(tag.probability, 3)] for tag in part] for part in tagger(whole[index])
            ]
    out.mkdir(parents=True, exist_ok=True)
    (out / TAGS_FILE).write_text(json.dumps(tags))
    tagger = tagger_of(torch.ones(len(images), dtype=torch.bool))
    tagger.save(out)
    return tagger


class TrainingTags:
    """Tags to train with: of classifiers that have not seen the picture, and now and then left out.

    Left out, so that the language model goes on looking at the picture itself.

    Args:
        tagger: for pictures that it was not fitted to.
        folder: with TAGS_FILE, if there is one.
        features: of every picture.
    """

    def __init__(self, tagger: Tagger, folder: Path, features: Features, seed: int):
        self.tagger, self.features, self.seed = tagger, features, seed
        path = folder / TAGS_FILE
        self.tags = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, image: str) -> str:
        """The tags of a picture, the same each time, as the language model reads them."""
        chance = random.Random(f"{self.seed} {image}")
        if chance.random() < LEAVE_OUT_ALL:
            return tag_text([], [])
        if image in self.tags:
            parts = [[Tag(*pair) for pair in part] for part in self.tags[image]]
        else:
            parts = self.tagger(self.features[image])
        return tag_text(*([tag for tag in part if chance.random() >= LEAVE_OUT_ONE] for part in parts))
