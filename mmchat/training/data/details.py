"""Longer descriptions, three to five sentences, put together from what people wrote of a picture.

Either one person wrote sentences that belong together, or several wrote one caption each. Of those, a sentence is taken
only if it names something new and disputes nothing: no other number or color of a thing, no man where another sees a
woman.
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
FEWEST, MOST = 3, 5  # sentences
MOST_CAPTIONS = 4  # of several people's; the fifth hardly ever says anything new
FEWEST_WORDS = 15
NEW_THINGS = 2  # that a sentence has to name

# Words that name nothing to be seen.
EMPTY = set(
    "a an the of in on at to with and or by for from his her its their is are be being was were has have while as that "
    "this these those there it he she they who which some something someone near next beside behind front back side "
    "top through into onto over under up down out off around along across between together other another each one two "
    "three four five six several many group pair couple few lot large small big little young old very can seen "
    "view background foreground picture photo image shot look looks looking".split()
)
# Somebody may be called by either word of a pair, but not by both in one description.
DISPUTED = (("man", "woman"), ("boy", "girl"), ("man", "boy"), ("woman", "girl"), ("man", "girl"), ("woman", "boy"))
DISPUTED += (("dog", "cat"), ("bicycle", "motorcycle"), ("car", "truck"), ("snow", "sand"), ("beach", "field"))


def detailed(picture: dict) -> str | None:
    """A description of several sentences that do not contradict each other; None where there is too little for one.

    Args:
        picture: as ``read_captions`` gives it; its ``sentences`` are preferred.
    """
    for told in picture.get("sentences") or ():
        text = _together(told)
        if text:
            return text
    if picture.get("sentences"):  # then its captions are the same sentences
        return None
    chosen = choose(picture["captions"])
    return _together(_second_mentions(chosen)) if len(chosen) >= FEWEST else None


def _together(told: Sequence[str]) -> str | None:
    sentences = [tidy_sentence(sentence) for sentence in told if len(sentence.split()) >= 2][:MOST]
    text = " ".join(sentences)
    return text if len(sentences) >= FEWEST and len(text.split()) >= FEWEST_WORDS else None


def tidy_sentence(text: str) -> str:
    """A capital first, a full stop last, small numbers as words, no space before a comma."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"\s+([.,!?;:'])", r"\1", text)
    text = re.sub(r"(?<![\w.,:/-])([2-6])(?= [a-z])", lambda found: NUMBERS[int(found[1]) - 1], text)
    text = re.sub(r"(?<=[.!?] )[a-z]", lambda found: found[0].upper(), re.sub(r"\bi\b", "I", text))
    text = text.rstrip(" .,;:-")
    return text[:1].upper() + text[1:] + ("" if text.endswith(("!", "?")) else ".")


def choose(captions: Sequence[str]) -> list[str]:
    """Up to MOST_CAPTIONS captions, the fullest first, each of which adds something and disputes nothing before it."""
    left = [caption for caption in dict.fromkeys(captions) if 4 <= len(caption.split()) <= 30 and _one(caption)]
    chosen: list[str] = []
    said: set[str] = set()
    while left and len(chosen) < MOST_CAPTIONS:
        agreeing = [caption for caption in left if not any(disputes(caption, other) for other in chosen)]
        if not agreeing:
            break
        best = max(agreeing, key=lambda caption: len(_named(caption) - said))  # of equals the first
        if len(_named(best) - said) < NEW_THINGS:
            break
        chosen.append(best)
        said |= _named(best)
        left.remove(best)
    return chosen


def _one(caption: str) -> bool:
    """Whether it is one sentence."""
    return not re.search(r"[.!?]\s+\w", caption)


def _named(caption: str) -> set[str]:
    """The things it names, in the singular: words before a verb, a small word or a comma. People are no news."""
    found = set()
    words = re.findall(r"[a-z]+|[,.;]", f"{caption.lower()} .")
    for word, after in zip(words, words[1:], strict=False):
        ends = not after.isalpha() or after in EMPTY or after.endswith(("ing", "ed")) or bool(action_of(after))
        word = SPELLINGS.get(word, word)
        if ends and len(word) > 2 and not word.endswith(("ing", "ed", "ly")) and not action_of(word):
            found.add(SINGULARS.get(word, word.removesuffix("s") if not word.endswith("ss") else word))
    return found - EMPTY - COLORS - PEOPLE.keys() - PEOPLE_WORDS


def disputes(one: str, other: str) -> bool:
    """Whether two captions name different numbers or colors of a thing, or different people."""
    first, second = _facts(one), _facts(other)
    for noun in first.keys() & second.keys():
        for fact in ("number", "color"):
            if first[noun][fact] and second[noun][fact] and first[noun][fact] != second[noun][fact]:
                return True
    kinds = [{SINGULARS.get(word, word) for word in words_of(caption)} for caption in (one, other)]
    for pair in DISPUTED:
        if any(
            a in kinds[0] and a not in kinds[1] and b in kinds[1] and b not in kinds[0] for a, b in (pair, pair[::-1])
        ):
            return True
    return _people(one) != _people(other) and None not in (_people(one), _people(other))


def _facts(caption: str) -> dict[str, dict[str, frozenset[str] | str]]:
    """Each thing's number ("one" of a singular) and colors."""
    words = words_of(re.sub(r"\b([2-6])\b", lambda found: NUMBERS[int(found[1]) - 1], caption))
    found = {}
    for place, word in enumerate(words):
        single = SINGULARS.get(word, word)
        before = words[max(place - 4, 0) : place]
        if single in EMPTY or single in COLORS:
            continue
        number = next((word for word in reversed(before) if word in NUMBERS), "")
        if not number and single in PLURALS:
            number = "one" if word == single else ""
        colors = frozenset(before[-3:]) & COLORS if before and before[-1] in COLORS else frozenset()
        found[single] = {"number": number if single in PLURALS else "", "color": colors}
    return found


def _people(caption: str) -> int | None:
    """How many people it speaks of; None where it does not say."""
    words = words_of(caption)
    total = 0
    for place, word in enumerate(words):
        if word in PEOPLE or word in ("person", "someone"):
            total += 1
        elif word in SINGULARS and SINGULARS[word] in PEOPLE or word in ("people", "adults", "men"):
            number = next((word for word in reversed(words[max(place - 3, 0) : place]) if word in NUMBERS), None)
            if number is None:
                return None
            total += NUMBERS.index(number) + 1
        elif word in ("group", "crowd", "couple", "several", "some", "pair", "family", "team"):
            return None
    return total or None


def _second_mentions(chosen: Sequence[str]) -> list[str]:
    """ "A dog …" becomes "The dog …" in a sentence after the first that named one."""
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
    """One of the wordings; half of the time the plain one."""
    return DETAIL if rng.random() < 0.5 else rng.choice(DETAIL_WORDINGS)


def detailed_pictures(pictures: Iterable[dict]) -> Iterable[tuple[dict, str]]:
    """The pictures that there is a detailed description of, with it."""
    return ((picture, text) for picture in pictures if (text := detailed(picture)))
