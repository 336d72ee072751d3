"""Captions → conversations: reads caption files in the common formats and writes descriptions and questions."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import BadInput
from .detailed_descriptions import DETAIL, asked_for_detail, detailed_pictures
from .llava_json import entry_of
from .questions import AGREEMENT, Question, ask, words_of

# The page sends "Describe the image." with a picture alone, so half of the pictures get this wording.
DESCRIBE = "Describe the image."
OTHER_WORDINGS = (
    "Describe this picture.", "Describe what you see.", "What is in this picture?", "What do you see?",
    "What is happening here?", "What is going on in this photo?", "Write a caption for this photo.",
    "Give a short description of the picture.", "What does the image show?", "Caption this image.",
    "Please describe the photo in one sentence.", "Tell me about this picture.", "Describe the image in one sentence.",
    "What can you see in the image?", "What is shown in the photo?", "Summarize this scene.", "Provide a caption.",
    "Describe the scene.", "What is this a picture of?", "Explain what the photo shows.", "Describe it briefly.",
)  # fmt: skip


RARE_KINDS = ("color", "count")


def read_captions(path: str | Path) -> list[dict[str, Any]]:
    """Reads pictures with their captions: ``{"image": file name, "captions": [text, …], "split": name or None}``.

    The formats are COCO JSON (``images`` and ``annotations``), Karpathy's JSON (``images`` with ``sentences`` and
    ``split``), a JSON list of ``{"image", "captions"}``, and Flickr8k's text lists (``name#number<tab>caption``, or
    ``name,caption`` below a header line).

    A JSON list may also have ``sentences``: for each caption, the list of sentences that one person wrote. They are
    kept, and such captions count as long descriptions.

    Raises:
        BadInput: the file is unreadable or in none of these formats.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path.name} cannot be read: {error.strerror}.") from error
    try:
        is_json = text.lstrip()[:1] in ("[", "{")
        pictures = _from_json(json.loads(text)) if is_json else _from_list(text)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"{path.name} is in no known caption format; use COCO or Karpathy JSON, a JSON list of pictures and "
            f"captions, or Flickr8k's list ({error!r})."
        ) from error
    if not pictures:
        raise BadInput(f"{path.name} holds no captions.")
    return pictures


def read_split(path: str | Path, splits: str | Path | None, split: str | None) -> list[dict[str, Any]]:
    """The pictures of one split, as ``read_captions`` returns them.

    Args:
        splits: a JSON file, split name → file names; None: use the splits in the caption file.
        split: the split's name; None for every picture.

    Raises:
        BadInput: a file is unreadable, or the split has no pictures.
    """
    pictures = all_pictures = read_captions(path)
    if splits:
        named = read_splits(splits)
        if split not in named:
            raise BadInput(f"{splits} has no split '{split}', only {', '.join(named)}.")
        by_name = {picture["image"]: picture for picture in pictures}
        pictures = [by_name[name] for name in named[split] if name in by_name]
    elif split:
        pictures = [picture for picture in pictures if picture["split"] == split]
    if not pictures:
        known = sorted({picture["split"] for picture in all_pictures if picture["split"]})
        raise BadInput(
            f"There are no pictures in the split '{split}'. "
            + (f"The splits are {', '.join(known)}." if known else "These captions name no splits: omit --split.")
        )
    return pictures


def read_splits(path: str | Path) -> dict[str, list[str]]:
    """Reads a JSON file of splits, split name → file names.

    Raises:
        BadInput: the file is unreadable or has another format.
    """
    try:
        return dict(json.loads(Path(path).read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise BadInput(f"{path} must be JSON of the form {{name of a split: [file name, …], …}}.") from error


def _from_json(content: Any) -> list[dict]:
    if isinstance(content, list):
        return [
            {
                "image": entry["image"],
                "captions": list(entry["captions"]),
                "split": entry.get("split"),
                **({"sentences": entry["sentences"]} if entry.get("sentences") else {}),
            }
            for entry in content
        ]
    if "annotations" in content:
        captions = defaultdict(list)
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        return [
            {"image": image["file_name"], "captions": captions[image["id"]], "split": None}
            for image in content["images"]
            if image["id"] in captions
        ]
    return [
        {
            "image": "/".join(filter(None, (image.get("filepath"), image["filename"]))),
            "captions": [sentence["raw"] for sentence in image["sentences"]],
            "split": image.get("split"),
        }
        for image in content["images"]
    ]


def _from_list(text: str) -> list[dict]:
    captions: dict[str, list[str]] = defaultdict(list)
    for number, line in enumerate(text.splitlines(), start=1):
        match = re.match(r"(.+?)#\d+\t(.+)", line) or re.match(r"(.+?\.\w+),(.+)", line)
        if match:
            captions[match[1]].append(match[2].strip('" '))
        elif line.strip() and number > 1:  # the first line may be a header
            raise ValueError(f"line {number}")
    return [{"image": image, "captions": found, "split": None} for image, found in captions.items()]


def tidy_caption(caption: str) -> str:
    """A caption as a sentence: capitalized, with a period, and without spaces before punctuation."""
    text = re.sub(r"\s+", " ", caption).strip()
    text = re.sub(r"\s+([.,!?;:'])", r"\1", text).rstrip(" .,;:") + "."
    return text[:1].upper() + text[1:]


def conversations(
    pictures: Sequence[dict],
    rng: random.Random,
    *,
    with_questions: bool = True,
    agreement: int = AGREEMENT,
    per_image: int | None = None,
    per_number: int | None = None,
    apart: bool = False,
    details: bool = False,
) -> Iterator[dict]:
    """LLaVA-Instruct entries: each caption as a description, with questions after a description or on their own.

    All captions of a picture answer the same prompt, so packing stores that prompt once. A question never follows a
    description that contains its answer: the model would learn to copy it instead of looking. Presence questions are
    the exception; without them "no" would be more frequent than "yes" after a description.

    Args:
        pictures: from ``read_captions``.
        with_questions: add the questions that the captions answer.
        agreement: as in ``ask``.
        per_image: maximum number of questions about a picture.
        per_number: maximum number of "how many" questions with the same answer, sampled at random.
        apart: put every question into its own conversation.
        details: add detailed descriptions.
    """
    if details:
        yield from details_to_train_on(pictures, rng)
    pictures = [picture for picture in pictures if not picture.get("sentences")]  # a long description is not a caption
    asked = ask(pictures, rng, agreement=agreement) if with_questions else [[] for _ in pictures]
    if with_questions:  # colors and counts are rare, so they are asked a second time in another wording
        for questions, again in zip(asked, ask(pictures, rng, agreement=agreement), strict=True):
            questions += [question for question in again if question.kind in RARE_KINDS]
    if per_number is not None:
        asked = _evened(asked, per_number, rng)
    for picture, questions in zip(pictures, asked, strict=True):
        image = picture["image"]
        wording = DESCRIBE if rng.random() < 0.5 else rng.choice(OTHER_WORDINGS)
        captions = [tidy_caption(caption) for caption in picture["captions"] if len(caption.split()) >= 3]
        turns = [[(wording, caption)] for caption in captions]
        for question in rng.sample(questions, len(questions))[:per_image]:
            open_turns = [] if apart else [turn for turn in turns if not _gives_away(turn, question)]
            if open_turns and rng.random() < 0.5:
                turn = rng.choice(open_turns)
                turn.append((_follow_up(question, turn[0][1], rng), question.answer))
            else:
                turns.append([(question.text, question.answer)])
        for number, turn in enumerate(turns):
            yield entry_of(f"{image}-{number}", image, turn)


def _evened(asked: Sequence[list[Question]], per_number: int, rng: random.Random) -> list[list[Question]]:
    """Drops "how many" questions at random until no answer has more than ``per_number``: most captions count two."""
    by_answer: dict[str, list[int]] = defaultdict(list)
    for question in (question for questions in asked for question in questions if question.kind == "count"):
        by_answer[question.answer].append(id(question))
    dropped = {one for found in by_answer.values() for one in rng.sample(found, max(len(found) - per_number, 0))}
    return [[question for question in questions if id(question) not in dropped] for questions in asked]


def details_to_train_on(pictures: Sequence[dict], rng: random.Random) -> Iterator[dict]:
    """Training entries: a detailed description of each picture that has one."""
    for picture, text in detailed_pictures(pictures):
        yield entry_of(f"{picture['image']}-detail", picture["image"], [(asked_for_detail(rng), text)])


def _gives_away(turn: Sequence[tuple[str, str]], question: Question) -> bool:
    """Whether a conversation already contains the answer."""
    said = {word for _, answer in turn for word in words_of(answer)}
    return question.kind != "presence" and not said.isdisjoint(words_of(question.answer))


def _follow_up(question: Question, said: str, rng: random.Random) -> str:
    """The question, at random with "it" for the noun if the description begins with that noun."""
    named = re.match(r"(?:A|The) (?:\w+ )?(\w+)", said)
    if question.kind == "color" and named and named[1] == question.subject and rng.random() < 0.5:
        return "What color is it?"
    return question.text


def descriptions(pictures: Sequence[dict]) -> Iterator[dict]:
    """Evaluation entries: one description per picture. The first caption is the answer, all are references."""
    for picture in pictures:
        if picture.get("sentences"):  # a long description, not a caption
            continue
        captions = [tidy_caption(caption) for caption in picture["captions"]]
        yield entry_of(
            picture["image"], picture["image"], [(DESCRIBE, captions[0])], kind="caption", references=captions
        )


def details_only(pictures: Sequence[dict]) -> Iterator[dict]:
    """Evaluation entries: one detailed description per picture, with all captions as references."""
    for picture, text in detailed_pictures(pictures):
        captions = [text] if picture.get("sentences") else [tidy_caption(caption) for caption in picture["captions"]]
        yield entry_of(
            f"{picture['image']}-detail", picture["image"], [(DETAIL, text)], kind="detail", references=captions
        )


def questions_only(
    pictures: Sequence[dict], rng: random.Random, *, kinds: Sequence[str] | None = None
) -> Iterator[dict]:
    """Evaluation entries: each question that the captions answer, with its kind.

    Args:
        kinds: only questions of these kinds; all if None.
    """
    pictures = [picture for picture in pictures if not picture.get("sentences")]
    for picture, questions in zip(pictures, ask(pictures, rng), strict=True):
        for number, question in enumerate(questions):
            if kinds is None or question.kind in kinds:
                name, turn = f"{picture['image']}-{question.kind}-{number}", [(question.text, question.answer)]
                yield entry_of(name, picture["image"], turn, kind=question.kind)
