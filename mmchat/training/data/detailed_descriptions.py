"""Detailed descriptions of three to five sentences, composed from human captions.

Some data sets have several sentences by one person. Otherwise captions by several people are combined: a caption is
added only if it names something new and contradicts nothing, such as another count or color of an object, or a woman
where an earlier caption has a man.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence

from .questions import COLORS, NUMBERS, PEOPLE, PEOPLE_WORDS, PLURALS, SINGULARS, SPELLINGS, action_of, words_of

DETAIL = "Describe the image in detail."
DETAIL_WORDINGS = (
    "Describe this picture in detail.", "Give a detailed description of the image.", "Describe everything you see.",
    "What do you see? Please be detailed.", "Tell me everything about this picture.", "Describe the photo at length.",
    "Write a few sentences about this photo.", "Describe the scene in several sentences.", "Give me all the details.",
    "Provide a long description of the picture.", "Explain in detail what the image shows.",
    "Please describe this photo thoroughly.", "What is there to see? Leave nothing out.",
)  # fmt: skip
MIN_SENTENCES, MAX_SENTENCES = 3, 5
MAX_CAPTIONS = 4  # a fifth caption rarely adds anything
MIN_WORDS = 15
MIN_NEW_OBJECTS = 2  # per caption

# Words that name no visible object.
EMPTY = set(
    "a an the of in on at to with and or by for from his her its their is are be being was were has have while as that "
    "this these those there it he she they who which some something someone near next beside behind front back side "
    "top through into onto over under up down out off around along across between together other another each one two "
    "three four five six several many group pair couple few lot large small big little young old very can seen "
    "view background foreground picture photo image shot look looks looking".split()
)
# Captions contradict each other if one uses the first word of a pair and the other the second.
CONFLICTING = (("man", "woman"), ("boy", "girl"), ("man", "boy"), ("woman", "girl"), ("man", "girl"), ("woman", "boy"))
CONFLICTING += (("dog", "cat"), ("bicycle", "motorcycle"), ("car", "truck"), ("snow", "sand"), ("beach", "field"))


def detailed(picture: dict) -> str | None:
    """A description of several consistent sentences; None if the captions do not suffice.

    Args:
        picture: from ``read_captions``; its ``sentences`` take precedence.
    """
    for sentences in picture.get("sentences") or ():
        text = _joined(sentences)
        if text:
            return text
    if picture.get("sentences"):  # the captions repeat these sentences
        return None
    chosen = choose(picture["captions"])
    return _joined(_second_mentions(chosen)) if len(chosen) >= MIN_SENTENCES else None


def _joined(sentences: Sequence[str]) -> str | None:
    """A text of the first MAX_SENTENCES sentences; None if it is too short."""
    tidy = [tidy_sentence(sentence) for sentence in sentences if len(sentence.split()) >= 2][:MAX_SENTENCES]
    text = " ".join(tidy)
    return text if len(tidy) >= MIN_SENTENCES and len(text.split()) >= MIN_WORDS else None


def tidy_sentence(text: str) -> str:
    """Capitalizes, ends with a period, spells out small numbers, and removes spaces before punctuation."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"\s+([.,!?;:'])", r"\1", text)
    text = re.sub(r"(?<![\w.,:/-])([2-6])(?= [a-z])", lambda found: NUMBERS[int(found[1]) - 1], text)
    text = re.sub(r"(?<=[.!?] )[a-z]", lambda found: found[0].upper(), re.sub(r"\bi\b", "I", text))
    text = text.rstrip(" .,;:-")
    return text[:1].upper() + text[1:] + ("" if text.endswith(("!", "?")) else ".")


def choose(captions: Sequence[str]) -> list[str]:
    """Chooses up to MAX_CAPTIONS consistent captions, greedily by the number of new objects they name."""
    remaining = [
        caption for caption in dict.fromkeys(captions) if 4 <= len(caption.split()) <= 30 and _is_one_sentence(caption)
    ]
    chosen: list[str] = []
    named: set[str] = set()
    while remaining and len(chosen) < MAX_CAPTIONS:
        consistent = [caption for caption in remaining if not any(contradict(caption, other) for other in chosen)]
        if not consistent:
            break
        best = max(consistent, key=lambda caption: len(_objects(caption) - named))  # the first of equals
        if len(_objects(best) - named) < MIN_NEW_OBJECTS:
            break
        chosen.append(best)
        named |= _objects(best)
        remaining.remove(best)
    return chosen


def _is_one_sentence(caption: str) -> bool:
    return not re.search(r"[.!?]\s+\w", caption)


def _objects(caption: str) -> set[str]:
    """The objects a caption names, in the singular: words before a verb, a function word or a comma; not people."""
    found = set()
    words = re.findall(r"[a-z]+|[,.;]", f"{caption.lower()} .")
    for word, after in zip(words, words[1:], strict=False):
        ends = not after.isalpha() or after in EMPTY or after.endswith(("ing", "ed")) or bool(action_of(after))
        word = SPELLINGS.get(word, word)
        if ends and len(word) > 2 and not word.endswith(("ing", "ed", "ly")) and not action_of(word):
            found.add(SINGULARS.get(word, word.removesuffix("s") if not word.endswith("ss") else word))
    return found - EMPTY - COLORS - PEOPLE.keys() - PEOPLE_WORDS


def contradict(one: str, other: str) -> bool:
    """Whether two captions give different counts or colors of an object, or different people."""
    first, second = _facts(one), _facts(other)
    for noun in first.keys() & second.keys():
        for fact in ("number", "color"):
            if first[noun][fact] and second[noun][fact] and first[noun][fact] != second[noun][fact]:
                return True
    kinds = [{SINGULARS.get(word, word) for word in words_of(caption)} for caption in (one, other)]
    for pair in CONFLICTING:
        if any(
            a in kinds[0] and a not in kinds[1] and b in kinds[1] and b not in kinds[0] for a, b in (pair, pair[::-1])
        ):
            return True
    return _people(one) != _people(other) and None not in (_people(one), _people(other))


def _facts(caption: str) -> dict[str, dict[str, frozenset[str] | str]]:
    """The count ("one" for a singular) and the colors of each object."""
    words = words_of(re.sub(r"\b([2-6])\b", lambda found: NUMBERS[int(found[1]) - 1], caption))
    found = {}
    for index, word in enumerate(words):
        single = SINGULARS.get(word, word)
        before = words[max(index - 4, 0) : index]
        if single in EMPTY or single in COLORS:
            continue
        number = next((word for word in reversed(before) if word in NUMBERS), "")
        if not number and single in PLURALS:
            number = "one" if word == single else ""
        colors = frozenset(before[-3:]) & COLORS if before and before[-1] in COLORS else frozenset()
        found[single] = {"number": number if single in PLURALS else "", "color": colors}
    return found


def _people(caption: str) -> int | None:
    """How many people a caption mentions; None if it does not say."""
    words = words_of(caption)
    total = 0
    for index, word in enumerate(words):
        if word in PEOPLE or word in ("person", "someone"):
            total += 1
        elif word in SINGULARS and SINGULARS[word] in PEOPLE or word in ("people", "adults", "men"):
            number = next((word for word in reversed(words[max(index - 3, 0) : index]) if word in NUMBERS), None)
            if number is None:
                return None
            total += NUMBERS.index(number) + 1
        elif word in ("group", "crowd", "couple", "several", "some", "pair", "family", "team"):
            return None
    return total or None


def _second_mentions(chosen: Sequence[str]) -> list[str]:
    """Changes "A dog …" to "The dog …" if an earlier sentence has a dog."""
    said: set[str] = set()
    result = []
    for caption in chosen:
        found = re.match(r"\s*(An?) ((?:\w+ ){0,2}?)(\w+)\b", caption)
        known = next((word for word in re.findall(r"\w+", caption.lower())[1:4] if word in PLURALS), None)
        if found and known in said:
            caption = re.sub(r"^\s*An? ", "The ", caption)
        result.append(caption)
        said |= set(words_of(caption)) & PLURALS.keys()
    return result


def asked_for_detail(rng: random.Random) -> str:
    """A random wording, the plain one half of the time."""
    return DETAIL if rng.random() < 0.5 else rng.choice(DETAIL_WORDINGS)


def detailed_pictures(pictures: Iterable[dict]) -> Iterable[tuple[dict, str]]:
    """The pictures that have a detailed description, each with it."""
    return ((picture, text) for picture in pictures if (text := detailed(picture)))
