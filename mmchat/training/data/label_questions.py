"""Questions that labels answer, made by rules, as conversations to train on and questions to evaluate on."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

from .conversations import entry_of
from .label_rules import Asker, LabelQuestion
from .labels import Labeled
from .naming import Dictionary


def conversations(
    pictures: Sequence[Labeled],
    rng: random.Random,
    *,
    dictionary: Dictionary | None = None,
    per_image: int | None = None,
) -> Iterator[dict]:
    """LLaVA-Instruct entries to train on, a question in each.

    Args:
        per_image: only so many questions about a picture, drawn by chance.
    """
    asked = Asker(pictures, rng, dictionary).ask()
    drawn = _evened([_drawn(questions, rng, per_image) for questions in asked], rng)
    for picture, questions in zip(pictures, drawn, strict=True):
        for number, question in enumerate(questions):
            yield entry_of(f"{picture.image}-label-{number}", picture.image, [(question.text, question.answer)])


def _evened(drawn: Sequence[list[LabelQuestion]], rng: random.Random) -> list[list[LabelQuestion]]:
    """Leaves out what drawing left too much of: each thing is affirmed as often as denied again."""
    by_subject: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: {"Yes.": [], "No.": []})
    for question in (question for questions in drawn for question in questions if question.subject):
        about = "room" if question.kind == "is room" else "thing"
        by_subject[about, question.subject][question.answer].append(id(question))
    left_out: set[int] = set()
    for answers in by_subject.values():
        fewer = min(map(len, answers.values()))
        for found in answers.values():
            left_out.update(rng.sample(found, len(found) - fewer))
    return [[question for question in questions if id(question) not in left_out] for questions in drawn]


def _drawn(questions: Sequence[LabelQuestion], rng: random.Random, count: int | None) -> list[LabelQuestion]:
    """So many questions, drawn by chance, half of them at most to be answered with yes or no."""
    mixed = rng.sample(questions, len(questions))
    if count is None:
        return mixed
    yes_no = [question for question in mixed if question.answer in ("Yes.", "No.")]
    left_out = {id(question) for question in yes_no[max(count // 2, 1) :]}
    return [question for question in mixed if id(question) not in left_out][:count]


def questions_only(
    pictures: Sequence[Labeled], rng: random.Random, *, dictionary: Dictionary | None = None
) -> Iterator[dict]:
    """Entries to evaluate on, each with its ``kind`` and, where there are several right answers, ``accepted``."""
    for picture, questions in zip(pictures, Asker(pictures, rng, dictionary, evaluation=True).ask(), strict=True):
        for number, question in enumerate(questions):
            extra = {"accepted": list(question.accepted)} if question.accepted else {}
            yield entry_of(
                f"{picture.image}-{question.kind.replace(' ', '-')}-{number}",
                picture.image,
                [(question.text, question.answer)],
                kind=question.kind,
                **extra,
            )
