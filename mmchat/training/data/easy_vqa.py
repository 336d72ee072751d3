"""easy-VQA (Zhou 2019): questions about one colored shape on a plain background, a first test of any recipe.

It has 4,000 training pictures with 38,575 questions and 1,000 test pictures with 9,673. The package ``easy-vqa`` of the
Python package index carries it under the MIT license.
"""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from ...fetching import fetch
from ...fetching.sources import Wheel
from .llava_json import entry_of

WHEEL = Wheel("easy-vqa", "1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f")


def extract_pictures(folder: str | Path, split: str, limit: int | None = None) -> int:
    """Writes the pictures of a split as ``<number>.png`` and returns how many there are.

    Raises:
        AssetError: the package cannot be fetched.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"easy_vqa/data/{split}/images/"
    with zipfile.ZipFile(fetch(WHEEL)) as archive:
        names = [name for name in archive.namelist() if name.startswith(prefix) and name.endswith(".png")]
        names = sorted(names, key=lambda name: int(Path(name).stem))[:limit]
        for name in names:
            with archive.open(name) as source, (folder / Path(name).name).open("wb") as sink:
                shutil.copyfileobj(source, sink)
    return len(names)


def questions(split: str, limit: int | None = None) -> dict[str, list[tuple[str, str]]]:
    """File name → questions and answers as sentences, for the first ``limit`` pictures."""
    with zipfile.ZipFile(fetch(WHEEL)) as archive:
        entries = json.loads(archive.read(f"easy_vqa/data/{split}/questions.json"))
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, picture in entries:
        if limit is None or picture < limit:
            found[f"{picture}.png"].append((question[:1].upper() + question[1:], f"{answer.capitalize()}."))
    return found


def conversations(
    split: str, rng: random.Random, *, limit: int | None = None, turns: int = 3, per_image: int | None = None
) -> Iterator[dict]:
    """LLaVA-Instruct entries of at most ``turns`` questions each, with ``per_image`` questions about each picture."""
    for picture, asked in questions(split, limit).items():
        chosen = rng.sample(asked, min(per_image or len(asked), len(asked)))
        for number, start in enumerate(range(0, len(chosen), turns)):
            yield entry_of(f"easy-vqa-{picture}-{number}", picture, chosen[start : start + turns])


def questions_only(split: str, *, limit: int | None = None) -> Iterator[dict]:
    """Evaluation entries: one question each, with its kind."""
    for picture, asked in questions(split, limit).items():
        for number, turn in enumerate(asked):
            yield entry_of(f"easy-vqa-{picture}-{number}", picture, [turn], kind="easy-vqa")
