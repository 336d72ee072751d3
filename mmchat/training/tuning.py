"""Tunes an image encoder to tell which words people will use for a picture, before anything reads its features.

ImageNet's classes are single things; captions also name colors, numbers and what happens. Learning visual features by
predicting the words of captions is Joulin et al. 2016, arXiv 1511.02251.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from ..device import choose_device
from ..errors import BadInput
from ..media import open_image
from ..models.efficientnet import EfficientNet
from ..models.image_encoder import ImageEncoder
from ..presets import IMAGE_ENCODER_FILE
from .data.cleaning import STOP_WORDS
from .data.questions import AGREEMENT, words_of

logger = logging.getLogger(__name__)

FROZEN_BLOCKS = 5  # edges and textures, which need no tuning, at the highest resolution, which costs most
SMALLEST_CROP = 0.65  # of a picture's sides, at least: what is learnt anew for every crop is learnt by heart later
COMMON = 12  # pictures whose captions have to agree on a word
SHARE = 0.5  # of the way from ImageNet's weights: better on other pictures than all of it (arXiv 2109.01903)
HEAD_RATE = 1e-3  # of the layer that predicts the words, which starts from nothing
DROPOUT = 0.3
BATCH = 32


def words_and_pairs(caption: str) -> set[str]:
    """The words of a caption that say something, and pairs of neighbours: "red shirt", "two dogs"."""
    words = words_of(caption)
    pairs = {f"{one} {other}" for one, other in pairwise(words) if not STOP_WORDS & {one, other}}
    return pairs | (set(words) - STOP_WORDS)


class PicturesWithWords(Dataset):
    """Crops of pictures, mirrored half of the time, and the share of their captions that use each word.

    Args:
        pictures: ``{"image": file name, "captions": [text, …]}``.
        folder: where the files lie.
        encoder: prepares the pixels.

    Raises:
        BadInput: the captions have no word in common.
    """

    def __init__(self, pictures: Sequence[dict], folder: Path, encoder: ImageEncoder):
        self.folder, self.encoder = folder, encoder
        self.names = [picture["image"] for picture in pictures]
        said = [
            Counter(word for caption in picture["captions"] for word in words_and_pairs(caption))
            for picture in pictures
        ]
        common = Counter(word for words in said for word, count in words.items() if count >= AGREEMENT)
        self.words = [word for word, count in common.most_common() if count >= COMMON]
        if not self.words:
            raise BadInput(f"No word is in the captions of {COMMON} pictures; these are too few to learn from.")
        self.shares = torch.tensor(
            [
                [words[word] / len(picture["captions"]) for word in self.words]
                for words, picture in zip(said, pictures, strict=True)
            ]
        )  # [pictures, words]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        picture = _crop(open_image(self.folder / self.names[index]))
        return {"pixels": self.encoder.pixels(picture), "labels": self.shares[index]}


def _crop(picture: Image.Image) -> Image.Image:
    """A random part, mirrored half of the time."""
    share = random.uniform(SMALLEST_CROP, 1)
    width, height = round(picture.width * share), round(picture.height * share)
    left, top = random.randint(0, picture.width - width), random.randint(0, picture.height - height)
    part = picture.crop((left, top, left + width, top + height))
    return ImageOps.mirror(part) if random.random() < 0.5 else part


class WordPredictor(nn.Module):
    """An EfficientNet-Lite and a layer that reads the mean and the largest of its features over the picture."""

    def __init__(self, network: EfficientNet, width: int, shares: torch.Tensor):
        super().__init__()
        self.network = network
        self.head = nn.Linear(2 * width, shares.shape[1])
        nn.init.zeros_(self.head.weight)
        self.head.bias.data = torch.logit(shares.mean(dim=0), eps=1e-4)  # how common each word is
        self.tuned = [*network.blocks[FROZEN_BLOCKS:], network.head]
        for module in self.tuned:
            module.requires_grad_(True)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss: cross-entropy of the words' shares, summed over words.

        Args:
            pixels: [batch, 3, height, width].
            labels: [batch, words], the share of captions with each word.
        """
        maps = self.network(pixels.contiguous(memory_format=torch.channels_last))
        features = torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)  # [batch, 2 · width]
        logits = self.head(nn.functional.dropout(features, DROPOUT, self.training))  # [batch, words]
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return {"loss": losses.sum(dim=1).mean()}


def tune_image_encoder(
    encoder: Any, pictures: Sequence[dict], folder: Path, out: Path, *, epochs: float, lr: float, seed: int = 0
) -> None:
    """Tunes an EfficientNet-Lite, and writes weights on the way there, in half precision, to ``out``.

    Its batch norms are folded away, so what is tuned is the convolutions alone.

    Args:
        encoder: as ``load_image_encoder`` gives it; its network is changed, so load what was written, and drop this.
        pictures, folder: as ``PicturesWithWords`` takes them.
        lr: of the convolutions; it falls to nothing along half a cosine.

    Raises:
        BadInput: a picture cannot be read, or the captions have no word in common.
    """
    set_seed(seed)
    start = {name: weight.clone() for name, weight in encoder.network.published_state().items()}
    dataset = PicturesWithWords(pictures, folder, encoder)
    logger.info("%d pictures and %d words to learn from", len(dataset), len(dataset.words))
    model = WordPredictor(encoder.network, encoder.preset.image_dim, dataset.shares)
    convolutions = [weight for module in model.tuned for weight in module.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": convolutions, "lr": lr}, {"params": model.head.parameters(), "lr": HEAD_RATE}], weight_decay=0.02
    )
    arguments = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # of all steps
        max_grad_norm=5.0,
        use_cpu=choose_device().type == "cpu",
        logging_steps=25,
        save_strategy="no",
        report_to=[],
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, optimizers=(optimizer, None))
    trainer.train()
    out.mkdir(parents=True, exist_ok=True)
    state = {
        name: start[name].lerp(weight.cpu(), SHARE).half().contiguous()
        for name, weight in encoder.network.published_state().items()
        if not name.startswith("_fc.")  # ImageNet's classes
    }
    save_file(state, out / IMAGE_ENCODER_FILE)
