"""Cleaning of training answers."""

from __future__ import annotations

import string
from typing import Any

# What says nothing by itself. A list of our own: nltk's has to be downloaded, and this works without a network.
STOP_WORDS = frozenset(
    "a an the this that these those there here it its he she they them his her their i you we me us my your our "
    "of in on at by to from with for as into onto over under about and or but so if then than is are was were be "
    "been being am do does did doing have has had having will would can could should may might must not no nor "
    "very just also too some any each both all more most other such only own same who whom which what when where "
    "why how".split()
)


def clean_answer(text: str) -> str:
    """An answer without punctuation and stop words: "The dog is brown." → "dog brown".

    An answer that has nothing else, such as "No.", keeps its words.
    """
    from nltk.tokenize import wordpunct_tokenize

    words = [word for word in wordpunct_tokenize(text) if any(letter not in string.punctuation for letter in word)]
    telling = [word for word in words if word.lower() not in STOP_WORDS]
    return " ".join(telling or words)


def clean_answers(entry: dict[str, Any]) -> dict[str, Any]:
    """A LLaVA-Instruct entry with its answers cleaned."""
    turns = [
        {**turn, "value": clean_answer(turn["value"])} if turn["from"] == "gpt" else turn
        for turn in entry["conversations"]
    ]
    return {**entry, "conversations": turns}
