"""Removes punctuation and stop words from training answers."""

from __future__ import annotations

import string
from typing import Any

# Our own list: nltk's must be downloaded, and this module works offline.
STOP_WORDS = frozenset(
    "a an the this that these those there here it its he she they them his her their i you we me us my your our "
    "of in on at by to from with for as into onto over under about and or but so if then than is are was were be "
    "been being am do does did doing have has had having will would can could should may might must not no nor "
    "very just also too some any each both all more most other such only own same who whom which what when where "
    "why how".split()
)


def clean_answer(text: str) -> str:
    """Removes punctuation and stop words: "The dog is brown." → "dog brown".

    An answer of stop words alone, such as "No.", keeps them.
    """
    from nltk.tokenize import wordpunct_tokenize

    words = [word for word in wordpunct_tokenize(text) if any(letter not in string.punctuation for letter in word)]
    content = [word for word in words if word.lower() not in STOP_WORDS]
    return " ".join(content or words)


def clean_answers(entry: dict[str, Any]) -> dict[str, Any]:
    """A copy of a LLaVA-Instruct entry with cleaned answers."""
    turns = [
        {**turn, "value": clean_answer(turn["value"])} if turn["from"] == "gpt" else turn
        for turn in entry["conversations"]
    ]
    return {**entry, "conversations": turns}
