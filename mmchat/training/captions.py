"""Captions → conversations: a description, and simple questions on what several people agree they see."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

DESCRIBE = (
    "Describe the image.",
    "Describe this picture.",
    "What is in this picture?",
    "What do you see?",
    "What is happening here?",
    "Write a short caption for this photo.",
)
COLORS = "black white brown red blue green yellow orange pink purple gray tan".split()
COLOR_SPELLINGS = {"grey": "gray"}
NUMBERS = {"two": "Two", "three": "Three", "four": "Four", "five": "Five"}

# Groups of words that captions use for one another: that nobody wrote "girl" shows that there is no girl only where
# nobody wrote "child" either.
OBJECT_GROUPS = (
    {"man": "men", "woman": "women", "boy": "boys", "girl": "girls", "child": "children"},
    {"dog": "dogs"},
    {"cat": "cats"},
    {"horse": "horses"},
    {"bird": "birds"},
    {"ball": "balls"},
    {"car": "cars"},
    {"bicycle": "bicycles", "bike": "bikes"},
    {"motorcycle": "motorcycles"},
    {"boat": "boats"},
    {"skateboard": "skateboards"},
    {"tree": "trees"},
    {"bench": "benches"},
    {"tent": "tents"},
    {"guitar": "guitars"},
    {"frisbee": "frisbees"},
    {"surfboard": "surfboards"},
    {"hat": "hats"},
    {"helmet": "helmets"},
    {"stick": "sticks"},
    {"toy": "toys"},
    {"swing": "swings"},
    {"fence": "fences"},
    {"building": "buildings"},
)
PEOPLE_WORDS = set(
    "man men woman women boy boys girl girls child children kid kids person people guy guys lady ladies baby toddler "
    "male female adult adults player players couple group crowd family someone he she his her they their rider climber "
    "surfer skier snowboarder skateboarder biker cyclist hiker runner skater swimmer teenager teenagers friends".split()
)
# "Is there a dog?" may say no only where nobody wrote any of these either.
ALIASES = {
    "dog": "puppy puppies poodle terrier retriever hound collie greyhound animal animals labrador".split(),
    "cat": "kitten kitty animal".split(),
    "horse": "pony horseback rodeo bronco animal jockey".split(),
    "bird": "seagull duck ducks geese goose pigeon pigeons eagle seagulls parrot animal".split(),
    "ball": "football soccer basketball baseball tennis volleyball toy rugby".split(),
    "car": "truck vehicle cars race van traffic street road".split(),
    "bicycle": "bike bikes biker cyclist cyclists bicyclist motorcycle dirtbike rider".split(),
    "motorcycle": "motorbike bike biker dirtbike rider atv".split(),
    "boat": "canoe kayak ship raft sailboat water".split(),
    "skateboard": "skateboarder skating skateboarding skater".split(),
    "tree": "forest woods branch branches wooded leaves log".split(),
    "surfboard": "surfer surfing surfs board wave".split(),
    "hat": "cap helmet".split(),
    "helmet": "biker cyclist football hat rider climber bike".split(),
    "building": "house city street wall store".split(),
    "fence": "gate railing obstacle".split(),
    "toy": "ball frisbee".split(),
    "swing": "playground swinging swings".split(),
    "stick": ["branch"],
}
COLORED_NOUNS = set(
    "dog dogs shirt dress jacket coat car ball bike shorts hat shirts pants cap helmet horse cat bird truck boat puppy "
    "frisbee suit sweater uniform uniforms collar toy tent umbrella building couch boots hair flag kayak sweatshirt "
    "jeans vest swimsuit bikini outfit grass flowers bicycle motorcycle hoodie jersey canoe slide bench surfboard top "
    "racecar backpack raft socks fence wall shoes snowsuit tank skirt kite".split()
)
PLURALS = {single: plural for group in OBJECT_GROUPS for single, plural in group.items()}
SINGULARS = {plural: single for single, plural in PLURALS.items()}


@dataclass(frozen=True)
class Question:
    """A question about a picture, its answer, and what it is about."""

    text: str
    answer: str
    kind: str  # presence, color or count
    subject: str  # the object's name in the singular


def tidy_caption(caption: str) -> str:
    """One sentence as people write it: a capital first, a full stop last, no space before either."""
    text = re.sub(r"\s+", " ", caption).strip()
    text = re.sub(r"\s+([.,!?;:'])", r"\1", text).rstrip(" .,;:") + "."
    return text[:1].upper() + text[1:]


def questions(captions: Sequence[str], seen_counts: Counter, rng: random.Random) -> list[Question]:
    """The questions the captions answer, drawing only on what at least two of them agree on.

    Args:
        captions: of one picture.
        seen_counts: in how many pictures of the collection each object is seen. Objects to say no about are drawn
            in this proportion, so that the object's name alone does not give the answer away.
    """
    words = [_words(caption) for caption in captions]
    return _presence(words, seen_counts, rng) + _colors(words, rng) + _counts(words)


def _words(caption: str) -> list[str]:
    return [COLOR_SPELLINGS.get(word, word) for word in re.findall(r"[a-z]+", caption.lower())]


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def seen_objects(captions: Sequence[str]) -> list[str]:
    """Objects that at least two captions of a picture name."""
    words = [_words(caption) for caption in captions]
    return [
        single
        for single, plural in PLURALS.items()
        if sum(single in caption or plural in caption for caption in words) >= 2
    ]


def _absent_objects(words: list[list[str]]) -> list[str]:
    """Objects that no caption names or hints at."""
    everything = {word for caption in words for word in caption}
    return [single for group in OBJECT_GROUPS for single in group if not everything & _rivals(single, group)]


def _presence(words: list[list[str]], seen_counts: Counter, rng: random.Random) -> list[Question]:
    seen = seen_objects([" ".join(caption) for caption in words])
    absent = _absent_objects(words)
    weights = [seen_counts[single] for single in absent]
    denied = set(rng.choices(absent, weights, k=len(seen))) if sum(weights) else set()
    forms = ("Is there {a} {noun}?", "Is there {a} {noun} in the picture?", "Can you see {a} {noun}?")
    return [
        Question(rng.choice(forms).format(a=_article(single), noun=single), answer, "presence", single)
        for singles, answer in ((seen, "Yes."), (sorted(denied), "No."))
        for single in singles
    ]


def _rivals(single: str, group: dict[str, str]) -> set[str]:
    """Words whose presence makes the absence of ``single`` doubtful."""
    rivals = {word for pair in group.items() for word in pair} | set(ALIASES.get(single, ()))
    return rivals | PEOPLE_WORDS if single in OBJECT_GROUPS[0] else rivals


def _colors(words: list[list[str]], rng: random.Random) -> list[Question]:
    found: dict[str, Counter] = {}
    for caption in words:
        pairs = {(noun, color) for color, noun in zip(caption, caption[1:], strict=False) if color in COLORS}
        for noun, color in pairs:
            if noun not in COLORS and noun not in ("and", "or", "with", "in") and len(noun) > 2:
                found.setdefault(noun, Counter())[color] += 1
    result = []
    for noun, colors in found.items():
        (color, count) = colors.most_common(1)[0]
        if count >= 2 and len(colors) == 1 and noun in COLORED_NOUNS:
            is_plural = noun.endswith("s") and not noun.endswith("ss")
            forms = (
                f"What color {'are' if is_plural else 'is'} the {noun}?",
                f"Which color {'do' if is_plural else 'does'} the {noun} have?",
            )
            result.append(Question(rng.choice(forms), f"{color.capitalize()}.", "color", SINGULARS.get(noun, noun)))
    return result


def _counts(words: list[list[str]]) -> list[Question]:
    found: dict[str, Counter] = {}
    for caption in words:
        for place, number in enumerate(caption):
            if number in NUMBERS:
                following = caption[place + 1 : place + 4]
                plural = next((word for word in following if word in SINGULARS or word == "people"), None)
                if plural:
                    found.setdefault(plural, Counter())[number] += 1
    result = []
    for plural, numbers in found.items():
        (number, count) = numbers.most_common(1)[0]
        if count >= 2 and len(numbers) == 1:
            answer = f"{NUMBERS[number]}."
            single = SINGULARS.get(plural, "person")
            result.append(Question(f"How many {plural} are there?", answer, "count", single))
    return result


def conversations(pictures: Sequence[dict], rng: random.Random) -> Iterator[dict]:
    """LLaVA-Instruct entries, one for each caption of each picture.

    Of five, about two describe the picture, two go on with a follow-up question, and one only answers questions.

    Args:
        pictures: ``{"image": file name, "captions": [text, …]}``.
    """
    seen_counts = Counter(single for picture in pictures for single in seen_objects(picture["captions"]))
    for picture in pictures:
        image = picture["image"]
        asked = questions(picture["captions"], seen_counts, rng)
        for number, caption in enumerate(picture["captions"]):
            if len(caption.split()) < 3:
                continue
            form = rng.choices(("describe", "follow up", "ask"), weights=(2, 2, 1))[0]
            chosen = [] if form == "describe" else _choose(asked, 2 if form == "ask" else 1, rng)
            if chosen and form == "ask":
                turns = [(question.text, question.answer) for question in chosen]
            else:
                text = tidy_caption(caption)
                describe = DESCRIBE[0] if rng.random() < 0.5 else rng.choice(DESCRIBE)
                turns = [(describe, text)]
                turns += [(_followup(question, text, rng), question.answer) for question in chosen]
            yield _entry(f"{image}-{number}", image, turns)


def _choose(asked: list[Question], count: int, rng: random.Random) -> list[Question]:
    """Draws kinds of questions evenly: presence can be asked of every picture, color and count of few."""
    by_kind: dict[str, list[Question]] = {}
    for question in rng.sample(asked, len(asked)):
        by_kind.setdefault(question.kind, []).append(question)
    kinds = [rng.choice(list(by_kind)) for _ in range(count)] if by_kind else []
    return [by_kind[kind].pop() for kind in kinds if by_kind[kind]]


def _followup(question: Question, description: str, rng: random.Random) -> str:
    """Sometimes "it" instead of the noun, where the description has just named it."""
    first_noun = next((word for word in _words(description) if word in COLORED_NOUNS), None)
    if question.kind == "color" and first_noun == question.subject and rng.random() < 0.5:
        return "What color is it?"
    return question.text


def _entry(identifier: str, image: str, turns: Sequence[tuple[str, str]]) -> dict:
    spoken = []
    for number, (question, answer) in enumerate(turns):
        spoken.append({"from": "human", "value": f"<image>\n{question}" if number == 0 else question})
        spoken.append({"from": "gpt", "value": answer})
    return {"id": identifier, "image": image, "conversations": spoken}
