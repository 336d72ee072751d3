#!/usr/bin/env python
"""Sixty fixed questions to the shipped `smol` weights: run it before and after a refactoring and compare.

    python benchmarks/same_answers.py > before.jsonl
    python benchmarks/same_answers.py > after.jsonl && diff before.jsonl after.jsonl

Prints one JSON line per answer, then a digest of all of them. Decoding is greedy, so nothing is random. Rounding
differs between processors and thread counts, so compare on one machine with one OMP_NUM_THREADS.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mmchat import Message, SamplingOptions, load  # noqa: E402

PICTURES = [
    "astronaut", "ball", "bananas", "boat", "bus", "camera", "coffee", "snail", "toaster", "train",
]  # fmt: skip
TEXT = (
    "What is the capital of France?",
    "Name three colors.",
    "Why is the sky blue?",
    "Write one sentence about the sea.",
    "How many days has a week?",
    "What is two plus two?",
    "Who wrote Romeo and Juliet?",
    "Say hello in Spanish.",
    "What do bees make?",
    "Give me a short rhyme about a cat.",
    "What is water made of?",
    "Explain gravity in one sentence.",
    "List two animals that can fly.",
    "What is the opposite of hot?",
    "Is a tomato a fruit?",
    "Tell me a fact about the moon.",
)
ABOUT_PICTURES = ("", "What is this?")  # an empty question asks for a description
CONVERSATIONS = (
    (None, ("My name is Ada.", "What is my name?", "Spell it backwards.")),
    (None, ("Tell me about Paris.", "How large is it?", "Which river runs through it?")),
    ("ball", ("What color is the ball?", "Where is it?", "Is there a dog?")),
    ("coffee", ("What is in the cup?", "Is there a table?", "Describe the image.")),
)
BEAMS = ("astronaut", "boat", "bus", "camera", "snail", "toaster", "train", "bananas")
# 16 without a picture, 20 about pictures, 12 in conversations, 8 with beams, and 4 about two pictures at once.
PAIRS = (("ball", "bus"), ("camera", "coffee"), ("snail", "train"), ("boat", "bananas"))


def picture(name: str) -> str:
    return str(ROOT / "examples" / f"{name}.jpg")


def conversations() -> Iterator[tuple[list[str], tuple[str, ...], int]]:
    """Yields pictures, the questions about them in order, and the number of beams."""
    for question in TEXT:
        yield [], (question,), 1
    for name in PICTURES:
        for question in ABOUT_PICTURES:
            yield [name], (question,), 1
    for name, questions in CONVERSATIONS:
        yield [name] if name else [], questions, 1
    for name in BEAMS:
        yield [name], ("Describe the image.",), 3
    for names in PAIRS:
        yield list(names), ("What is in these pictures?",), 1


def main() -> None:
    engine = load("smol")
    lines = []
    for names, questions, beams in conversations():
        options = SamplingOptions(temperature=0, max_new_tokens=40, beams=beams)
        messages: list[Message] = []
        for turn, question in enumerate(questions, start=1):
            messages.append(Message("user", question, [picture(name) for name in names] if turn == 1 else []))
            answer = "".join(engine.reply(messages, options))
            messages.append(Message("assistant", answer))
            line = {"images": names, "turn": turn, "question": question, "beams": beams, "answer": answer}
            lines.append(json.dumps(line, ensure_ascii=False))
            print(lines[-1], flush=True)
    print(json.dumps({"answers": len(lines), "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()}))


if __name__ == "__main__":
    main()
