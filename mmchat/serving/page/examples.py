"""The cards of an empty conversation: a photo and a question each."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_examples(folder: Path) -> list[list[str]]:
    """Pairs of question and picture from ``examples.csv``; empty if there is no such file."""
    table = folder / "examples.csv"
    if not table.is_file():
        return []
    with table.open(newline="", encoding="utf-8") as lines:
        return [[row["question"], str(folder / row["image"])] for row in csv.DictReader(lines)]


def cards(examples: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """The examples as the Chatbot shows them."""
    return [{"text": question, "files": [picture]} for question, picture in examples]
