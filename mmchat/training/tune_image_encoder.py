"""Fine-tunes an image encoder to predict the words of captions (Joulin et al. 2016, arXiv 1511.02251).

ImageNet's classes are objects; captions also name colors, numbers and actions. The tuning comes before any features
are computed.
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

FROZEN_BLOCKS = 5  # the first blocks compute edges and textures, which need no tuning, and cost the most
MIN_CROP = 0.65  # minimum crop side as a fraction of the picture; random crops delay overfitting
MIN_PICTURES = 12  # pictures whose captions must agree on a word to include it
SHARE = 0.5  # interpolation from ImageNet's weights; generalizes better than 1 (WiSE-FT, arXiv 2109.01903)
HEAD_LEARNING_RATE = 1e-3  # of the new word classifier
DROPOUT = 0.3
BATCH_SIZE = 32


def words_and_pairs(caption: str) -> set[str]:
    """The content words of a caption and its pairs of adjacent content words: "red shirt", "two dogs"."""
    words = words_of(caption)
    pairs = {f"{one} {other}" for one, other in pairwise(words) if not STOP_WORDS & {one, other}}
    return pairs | (set(words) - STOP_WORDS)


class PicturesWithWords(Dataset):
    """Random crops and flips of images, each with the fraction of its captions that use each word.

    Args:
        pictures: ``{"image": file name, "captions": [text, …]}``.
        folder: holds the picture files.
        encoder: prepares the pixels.

    Raises:
        BadInput: no word occurs in enough captions.
    """

    def __init__(self, pictures: Sequence[dict], folder: Path, encoder: ImageEncoder):
        self.folder, self.encoder = folder, encoder
        self.names = [picture["image"] for picture in pictures]
        said = [
            Counter(word for caption in picture["captions"] for word in words_and_pairs(caption))
            for picture in pictures
        ]
        common = Counter(word for words in said for word, count in words.items() if count >= AGREEMENT)
        self.words = [word for word, count in common.most_common() if count >= MIN_PICTURES]
        if not self.words:
            raise BadInput(f"No word is in the captions of {MIN_PICTURES} pictures: there are too few pictures.")
        self.targets = torch.tensor(
            [
                [words[word] / len(picture["captions"]) for word in self.words]
                for words, picture in zip(said, pictures, strict=True)
            ]
        )  # [pictures, words]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        picture = _crop(open_image(self.folder / self.names[index]))
        square = ImageOps.fit(picture, (self.encoder.preset.resolution,) * 2)  # batches need images of one shape
        return {"pixels": self.encoder.preprocess(square), "labels": self.targets[index]}


def _crop(picture: Image.Image) -> Image.Image:
    """A random crop, mirrored with probability one half."""
    scale = random.uniform(MIN_CROP, 1)
    width, height = round(picture.width * scale), round(picture.height * scale)
    left, top = random.randint(0, picture.width - width), random.randint(0, picture.height - height)
    part = picture.crop((left, top, left + width, top + height))
    return ImageOps.mirror(part) if random.random() < 0.5 else part


class WordPredictor(nn.Module):
    """An EfficientNet-Lite with a linear word classifier on the mean-pooled and max-pooled features."""

    def __init__(self, network: EfficientNet, image_dim: int, targets: torch.Tensor):
        super().__init__()
        self.network = network
        self.head = nn.Linear(2 * image_dim, targets.shape[1])
        nn.init.zeros_(self.head.weight)
        self.head.bias.data = torch.logit(targets.mean(dim=0), eps=1e-4)  # word frequencies
        self.tuned = [*network.blocks[FROZEN_BLOCKS:], network.head]
        for module in self.tuned:
            module.requires_grad_(True)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The binary cross-entropy, summed over words and averaged over the batch.

        Args:
            pixels: [batch, 3, height, width].
            labels: the fraction of captions with each word, [batch, words].
        """
        maps = self.network(pixels.contiguous(memory_format=torch.channels_last))  # [batch, image_dim, rows, columns]
        features = torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)  # [batch, 2 · image_dim]
        logits = self.head(nn.functional.dropout(features, DROPOUT, self.training))  # [batch, words]
        losses = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return {"loss": losses.sum(dim=1).mean()}


def tune_image_encoder(
    encoder: Any, pictures: Sequence[dict], folder: Path, out: Path, *, epochs: float, lr: float, seed: int = 0
) -> None:
    """Tunes an EfficientNet-Lite and writes weights halfway between the original and the tuned ones, in fp16.

    The batch norms are folded into the convolutions, so tuning changes convolutions only.

    Args:
        encoder: from ``load_image_encoder``. Tuning changes its network in place: drop it and load the written weights.
        pictures, folder: as in ``PicturesWithWords``.
        lr: peak learning rate of the convolutions, with cosine decay to 0.

    Raises:
        BadInput: a picture is unreadable, or no word occurs in enough captions.
    """
    set_seed(seed)
    start = {name: weight.clone() for name, weight in encoder.network.published_state().items()}
    dataset = PicturesWithWords(pictures, folder, encoder)
    logger.info("Tuning on %d pictures and %d words", len(dataset), len(dataset.words))
    model = WordPredictor(encoder.network, encoder.preset.image_dim, dataset.targets)
    convolutions = [weight for module in model.tuned for weight in module.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": convolutions, "lr": lr}, {"params": model.head.parameters(), "lr": HEAD_LEARNING_RATE}],
        weight_decay=0.02,
    )
    arguments = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH_SIZE,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # a fraction of all steps
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
        if not name.startswith("_fc.")  # ImageNet's classifier
    }
    save_file(state, out / IMAGE_ENCODER_FILE)
