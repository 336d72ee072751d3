"""Rule-based questions about labeled pictures, as training conversations and as evaluation questions."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

from .captions import DESCRIBE
from .label_rules import Asker, LabelQuestion
from .labels import Labeled
from .llava_json import entry_of
from .naming import Dictionary, accepted, with_article

MIN_NAMES = 3


def conversations(
    pictures: Sequence[Labeled],
    rng: random.Random,
    *,
    dictionary: Dictionary | None = None,
    per_image: int | None = None,
    kinds: Sequence[str] | None = None,
) -> Iterator[dict]:
    """LLaVA-Instruct training entries, one question each.

    Args:
        per_image: maximum number of questions about a picture, sampled at random.
        kinds: only questions of these kinds; all if None.
    """
    asked = [_of_kinds(questions, kinds) for questions in Asker(pictures, rng, dictionary).ask()]
    sampled = _balanced([_sampled(questions, rng, per_image) for questions in asked], rng)
    for picture, questions in zip(pictures, sampled, strict=True):
        for number, question in enumerate(questions):
            yield entry_of(f"{picture.image}-label-{number}", picture.image, [(question.text, question.answer)])


def _balanced(sampled: Sequence[list[LabelQuestion]], rng: random.Random) -> list[list[LabelQuestion]]:
    """Drops questions until each subject has as many yes as no answers, which sampling has unbalanced."""
    by_subject: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: {"Yes.": [], "No.": []})
    for question in (question for questions in sampled for question in questions if question.subject):
        about = "room" if question.kind == "is room" else "thing"
        by_subject[about, question.subject][question.answer].append(id(question))
    dropped: set[int] = set()
    for answers in by_subject.values():
        fewer = min(map(len, answers.values()))
        for found in answers.values():
            dropped.update(rng.sample(found, len(found) - fewer))
    return [[question for question in questions if id(question) not in dropped] for questions in sampled]


def _sampled(questions: Sequence[LabelQuestion], rng: random.Random, count: int | None) -> list[LabelQuestion]:
    """At most ``count`` random questions, at most half of them yes/no questions."""
    shuffled = rng.sample(questions, len(questions))
    if count is None:
        return shuffled
    yes_no = [question for question in shuffled if question.answer in ("Yes.", "No.")]
    dropped = {id(question) for question in yes_no[max(count // 2, 1) :]}
    return [question for question in shuffled if id(question) not in dropped][:count]


def _of_kinds(questions: list[LabelQuestion], kinds: Sequence[str] | None) -> list[LabelQuestion]:
    return [question for question in questions if kinds is None or question.kind in kinds]


def questions_only(
    pictures: Sequence[Labeled],
    rng: random.Random,
    *,
    dictionary: Dictionary | None = None,
    kinds: Sequence[str] | None = None,
) -> Iterator[dict]:
    """Evaluation entries, each with its ``kind`` and, if several answers are right, ``accepted``.

    Args:
        kinds: only questions of these kinds; all if None.
    """
    for picture, questions in zip(pictures, Asker(pictures, rng, dictionary, evaluation=True).ask(), strict=True):
        for number, question in enumerate(_of_kinds(questions, kinds)):
            extra = {"accepted": list(question.accepted)} if question.accepted else {}
            yield entry_of(
                f"{picture.image}-{question.kind.replace(' ', '-')}-{number}",
                picture.image,
                [(question.text, question.answer)],
                kind=question.kind,
                **extra,
            )


def names(pictures: Sequence[Labeled], *, dictionary: Dictionary | None = None) -> Iterator[dict]:
    """Entries for SCST: "Describe the image." about each picture with a label, "answered" by every name of the thing.

    The names carry no period, by which the reward knows them from captions. Pictures with fewer than three forms of a
    name are left out: their question would not count as open.
    """
    dictionary = dictionary or Dictionary()
    for picture in pictures:
        if picture.label:
            found = dictionary.names_of(picture.label, picture.synset)
            known = list(dict.fromkeys([*accepted(found), with_article(found.name)]))
            for number, name in enumerate(known if len(known) >= MIN_NAMES else ()):
                yield entry_of(f"{picture.image}-name-{number}", picture.image, [(DESCRIBE, name)])
