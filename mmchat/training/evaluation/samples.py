"""Writes a few pictures with the model's answers, the first thing to look at after training."""

from __future__ import annotations

import json
import logging
import textwrap
from itertools import islice
from pathlib import Path

from ...conversation import SamplingOptions
from ...errors import BadInput
from ..data.features import FeatureStore, PictureFolder, read_picture
from ..data.llava_json import Conversation, read_conversations
from .evaluator import Evaluator, Item

logger = logging.getLogger(__name__)

WIDTH = 44  # characters per line above a picture


def write_samples(
    evaluator: Evaluator, path: str | Path, features: FeatureStore | PictureFolder, count: int, folder: Path | None
) -> None:
    """Answers the first question about each of ``count`` pictures and writes samples.json and samples.png.

    Args:
        path: a file of conversations.
        folder: where to write; None writes nothing, for the other processes of a sharded model.
    """
    items = list(islice(_first_questions(path), count))
    answers = evaluator.answers(items, features, SamplingOptions(temperature=0, max_new_tokens=48))
    if folder is None:
        return
    samples = [
        {
            "image": item.conversation.images[0],
            "question": item.question[-1].text,
            "answer": answer,
            "people": item.answer,
        }
        for item, answer in zip(items, answers, strict=True)
    ]
    (folder / "samples.json").write_text(json.dumps(samples, indent=1, ensure_ascii=False))
    if samples:
        _draw(samples, features.pictures, folder / "samples.png")


def _first_questions(path: str | Path):
    """The first question about each picture."""
    seen = set()
    for conversation in read_conversations(path):
        first = next(index for index, message in enumerate(conversation.messages) if message.role == "assistant")
        opening = Conversation(conversation.id, conversation.messages[: first + 1])
        if opening.images and opening.images[0] not in seen:
            seen.add(opening.images[0])
            yield Item(opening, "sample", (opening.messages[-1].text,))


def _draw(samples: list[dict], pictures: Path, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(samples), 4.8), layout="tight")
    FigureCanvasAgg(figure)
    for axes, sample in zip(figure.subplots(1, len(samples), squeeze=False)[0], samples, strict=True):
        axes.axis("off")
        try:
            axes.imshow(read_picture(pictures, sample["image"]))
        except BadInput as error:  # the pictures may be gone, the features remain
            logger.info("%s is not drawn: %s", sample["image"], error)
        texts = [sample["question"], f"→ {sample['answer']}"]
        printable = ["".join(letter if letter.isprintable() else " " for letter in text) for text in texts]
        lines = [line for text in printable for line in textwrap.wrap(text, WIDTH)]
        axes.set_title("\n".join(lines), fontsize=10, loc="left", parse_math=False)
    figure.savefig(path, dpi=110)
