"""Rule-based questions that captions answer: is there …, what color, how many, what is … doing, who, where.

A question needs at least two captions of a picture that agree on its answer. The answer is "no" only if no caption
names the thing or a possible synonym. For training, colors and counts may come from a single caption that no other
contradicts: this gives three times as many, nearly as accurate.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

AGREEMENT = 2  # captions that must agree

COLORS = set("black white brown red blue green yellow orange pink purple gray tan".split())
SPELLINGS = {"grey": "gray", "colour": "color", "puppy": "dog", "puppies": "dogs", "bike": "bicycle", "kid": "child"}
SPELLINGS |= {"bikes": "bicycles", "kids": "children", "lady": "woman", "ladies": "women", "guy": "man", "guys": "men"}
NUMBERS = ("one", "two", "three", "four", "five", "six")

PEOPLE = {"man": "men", "woman": "women", "boy": "boys", "girl": "girls", "child": "children"}
THINGS = {
    word: f"{word}s"
    for word in "dog cat horse bird ball car bicycle motorcycle boat skateboard tree tent guitar frisbee surfboard hat "
    "helmet stick toy swing fence building camera table chair umbrella kayak snowboard wave rope slide fountain "
    "backpack sign rock wall ramp pool mountain".split()
} | {"bench": "benches", "beach": "beaches", "couch": "couches"}
ANIMALS = {"dog", "cat", "horse", "bird"}
PLURALS = PEOPLE | THINGS
SINGULARS = {plural: single for single, plural in PLURALS.items()}

# Words that may mean any person: next to one of them, "Is there a man?" has no certain answer.
PEOPLE_WORDS = set(
    "person people adult adults player players couple group crowd family someone he she his her they their him male "
    "female rider climber surfer skier snowboarder skateboarder biker cyclist hiker runner skater swimmer teenager "
    "teenagers friend friends team band teen teens youth youths worker performer dancer dancers athlete bride groom "
    "mother father toddler toddlers baby child children".split()
)
# Synonyms of a thing, and words that suggest it: a caption with one of them rules out the answer "no".
HINTS = {
    "dog": "poodle terrier retriever hound collie greyhound greyhounds animal animals labrador lab pet",
    "cat": "kitten kitty animal",
    "horse": "pony horseback rodeo bronco animal jockey jockeys",
    "bird": "seagull duck ducks geese goose pigeon pigeons eagle seagulls parrot animal",
    "ball": "football soccer basketball baseball tennis volleyball toy rugby",
    "car": "truck vehicle race racecar van traffic street road",
    "bicycle": "biker cyclist cyclists bicyclist motorcycle dirtbike rider bmx",
    "motorcycle": "motorbike bicycle biker dirtbike rider atv",
    "boat": "canoe kayak ship raft sailboat water",
    "skateboard": "skateboarder skating skateboarding skater skate board",
    "tree": "forest woods branch branches wooded leaves log",
    "surfboard": "surfer surfing surfs board wave",
    "hat": "cap helmet costume",
    "helmet": "biker cyclist football hat rider climber bicycle motorcycle hockey",
    "building": "house city street wall store",
    "fence": "gate railing obstacle",
    "toy": "ball frisbee",
    "swing": "playground swinging",
    "stick": "branch",
    "camera": "picture photo pose poses posing photograph",
    "table": "eating restaurant desk",
    "chair": "bench seat sits sitting",
    "wave": "surfer surfing surfs ocean",
    "rope": "climber climbing climbs swing leash",
    "fountain": "water",
    "sign": "store city street",
    "rock": "rocks rocky mountain cliff climber climbing stone",
    "wall": "building brick graffiti climbing",
    "ramp": "skateboarder skateboard trick",
    "pool": "water swimming swims",
    "mountain": "hill cliff rocky climber hiker hiking snow",
    "beach": "sand ocean water shore sandy",
    "snowboard": "snowboarder snowboarding snow",
    "kayak": "canoe boat kayaker water",
    "backpack": "bag hiker hiking",
    "couch": "sofa",
}
COLORED = set(
    "dog shirt dress jacket coat car ball bicycle shorts hat shirts pants cap helmet horse cat bird truck boat frisbee "
    "suit sweater uniform uniforms collar toy tent umbrella building couch boots hair flag kayak sweatshirt jeans vest "
    "swimsuit bikini outfit flowers motorcycle hoodie jersey canoe slide bench surfboard top racecar backpack raft "
    "socks fence wall shoes snowsuit skirt kite sled wetsuit".split()
)
# Verb in captions → the answer; None: no question about it.
ACTIONS = {
    "run": "Running", "jump": "Jumping", "leap": "Jumping", "play": "Playing", "stand": "Standing", "sit": "Sitting",
    "walk": "Walking", "hold": None, "ride": "Riding", "climb": "Climbing", "swim": "Swimming", "carry": None,
    "smile": "Smiling", "pose": "Posing", "race": "Racing", "dance": "Dancing", "eat": "Eating", "chase": "Chasing",
    "swing": "Swinging", "watch": "Watching", "talk": "Talking", "ski": "Skiing", "slide": "Sliding", "fly": None,
    "surf": "Surfing", "splash": "Splashing", "fish": "Fishing", "read": "Reading", "drink": "Drinking",
    "skateboard": "Skateboarding", "fight": "Fighting", "throw": "Throwing", "laugh": "Laughing", "skate": "Skating",
    "hike": "Hiking", "sleep": "Sleeping", "snowboard": "Snowboarding", "dive": "Diving", "sing": "Singing",
    "kick": "Kicking", "push": "Pushing", "pull": "Pulling", "lie": "Lying down", "lay": "Lying down",
}  # fmt: skip
PLACES = {
    "grass": "On the grass", "water": "In the water", "snow": "In the snow", "field": "In a field",
    "beach": "On the beach", "pool": "In a pool", "street": "On the street", "sand": "On the sand", "park": "In a park",
    "sidewalk": "On the sidewalk", "road": "On the road", "ocean": "In the ocean", "lake": "At a lake",
    "woods": "In the woods", "forest": "In the woods", "playground": "On a playground", "river": "In a river",
    "mountain": "On a mountain", "bench": "On a bench", "track": "On a track", "ramp": "On a ramp", "bed": "On a bed",
    "couch": "On a couch", "yard": "In a yard", "mud": "In the mud", "trampoline": "On a trampoline",
}  # fmt: skip
LIKE_PLACES = ({"beach", "sand", "ocean", "water"}, {"street", "road", "sidewalk"}, {"grass", "field", "park", "yard"})

# Many wordings: a model trained on few of them answers others worse.
OPENINGS = ("",) * 8 + (
    "In this picture, ", "Looking at the image, ", "Look closely: ", "Please answer briefly: ", "For this picture: ",
    "A question about this photo: ", "Hello! ", "Take a good look. ",
)  # fmt: skip
WHERE_SHOWN = ("", "", " in the picture", " in the image", " in this photo", " here")
WORDINGS = {
    "presence": (
        "Is there {a} {noun}{shown}?", "Is there {a} {noun}{shown}?", "Is {a} {noun} visible{shown}?",
        "Can you see {a} {noun}{shown}?", "Do you see {a} {noun}{shown}?", "Does the picture show {a} {noun}?",
        "Does this image contain {a} {noun}?", "Is {a} {noun} present{shown}?", "Are there any {plural}{shown}?",
        "Can {a} {noun} be seen{shown}?", "Is {a} {noun} shown{shown}?", "Does the photo have {a} {noun} in it?",
        "Do you notice {a} {noun}{shown}?", "Are {plural} visible{shown}?", "Is there any {noun}{shown}?",
        "Is {a} {noun} anywhere{shown}?", "Does this scene include {a} {noun}?", "Is {a} {noun} part of the picture?",
        "Is it true that there is {a} {noun}{shown}?", "Are there {plural}{shown}?", "Do you find {a} {noun}{shown}?",
        "There is {a} {noun}{shown}, right?", "Did the photographer catch {a} {noun}?", "Any {plural}{shown}?",
        "Is {a} {noun} among the things you see?", "Does {a} {noun} appear{shown}?", "Has the photo got {a} {noun}?",
        "Please check whether there is {a} {noun}{shown}.", "Is it right that {a} {noun} is visible{shown}?",
    ),
    "color": (
        "What color {is_are} the {noun}?", "What color {is_are} the {noun}?", "Which color {is_are} the {noun}{shown}?",
        "What is the color of the {noun}?", "What colour {is_are} the {noun}?", "Tell me the color of the {noun}.",
        "What is the {noun}'s color?", "The {noun}: what color {is_are} it?", "Name the color of the {noun}{shown}.",
        "What colour can you see on the {noun}?", "Can you tell me what color the {noun} {is_are}?",
        "Say which color the {noun} {is_are}.", "Describe the color of the {noun}.", "What shade {is_are} the {noun}?",
        "Give the color of the {noun}{shown}.", "What color would you call the {noun}?",
        "In one word, what color {is_are} the {noun}?",
    ),
    "count": (
        "How many {plural} are there{shown}?", "How many {plural} are there{shown}?", "How many {plural} do you see?",
        "How many {plural} can you see{shown}?", "How many {plural} are{shown_or_here}?",
        "What is the number of {plural}{shown}?", "Count the {plural}{shown}.",
        "How many {plural} are visible{shown}?", "How many {plural} does the photo show?",
        "Tell me how many {plural} there are{shown}.", "What number of {plural} can be seen{shown}?",
        "How many {plural} appear{shown}?", "Give the number of {plural}{shown}.", "How many {plural} can be counted?",
    ),
    "doing": (
        "What is the {noun} doing?", "What is the {noun} doing{shown}?", "What does the {noun} do?",
        "What is the {noun} up to?", "What action is the {noun} performing?", "Tell me what the {noun} is doing.",
    ),
    "who": ("Who is in the picture?", "Who is in this photo?", "Who do you see?", "Who can be seen here?"),
    "where": (
        "Where is the {noun}?", "Where was this picture taken?", "Where does this take place?", "Where is this?",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question about a picture and its answer."""

    text: str
    answer: str
    kind: str  # a key of WORDINGS
    subject: str  # the noun it is about, in the singular


def words_of(caption: str) -> list[str]:
    """Lower-case words, in one spelling."""
    return [SPELLINGS.get(word, word) for word in re.findall(r"[a-z]+", caption.lower())]


def ask(pictures: Sequence[dict], rng: random.Random, *, agreement: int = AGREEMENT) -> list[list[Question]]:
    """The questions that the captions of each picture answer, in the order of ``pictures``.

    Presence questions are balanced per object over the whole collection: as many yes as no answers, so the object's
    name says nothing about the answer.

    Args:
        pictures: ``{"image": file name, "captions": [text, …]}``.
        agreement: captions that must name the same color or count; none may name another.
    """
    captions = [[words_of(caption) for caption in picture["captions"]] for picture in pictures]
    presence = _presence(captions, rng)
    return [
        presence[index]
        + [question for rule in (_colors, _counts) for question in rule(words, rng, agreement)]
        + [question for rule in (_actions, _people, _places) for question in rule(words, rng)]
        for index, words in enumerate(captions)
    ]


def word(wordings: Sequence[str], rng: random.Random, **parts: str) -> str:
    """Fills in a random wording, with a random opening and a random "in the picture"."""
    opening, shown = rng.choice(OPENINGS), rng.choice(WHERE_SHOWN)
    text = rng.choice(wordings).format(shown=shown, shown_or_here=shown or " here", **parts)
    return opening + (text[0].lower() + text[1:] if opening.endswith((", ", ": ")) else text)


def _agreed(captions: Iterable[Iterable[str]]) -> Counter:
    """The items that at least AGREEMENT captions contain, with the number of captions."""
    counts = Counter(thing for caption in captions for thing in sorted(set(caption)))
    return Counter({thing: count for thing, count in counts.items() if count >= AGREEMENT})


def seen_objects(captions: Sequence[Sequence[str]]) -> list[str]:
    """The objects that the captions agree on, in the singular."""
    return sorted(_agreed([SINGULARS.get(word, word) for word in words] for words in captions).keys() & PLURALS.keys())


def _may_deny(single: str, words: set[str]) -> bool:
    """Whether captions with these words leave no doubt that the picture has no such object."""
    if {single, PLURALS[single], *HINTS.get(single, "").split()} & words:
        return False
    return single not in PEOPLE or not PEOPLE_WORDS & words


def _presence(captions: Sequence[Sequence[Sequence[str]]], rng: random.Random) -> list[list[Question]]:
    everything = [{word for caption in words for word in caption} for words in captions]
    positives, negatives = defaultdict(list), defaultdict(list)
    for index, words in enumerate(captions):
        for single in seen_objects(words):
            positives[single].append(index)
        for single in PLURALS:
            if _may_deny(single, everything[index]):
                negatives[single].append(index)
    result: list[list[Question]] = [[] for _ in captions]
    for single in PLURALS:
        count = min(len(positives[single]), len(negatives[single]))
        for answer, indices in (("Yes.", positives[single]), ("No.", negatives[single])):
            for index in rng.sample(indices, count):
                article = "an" if single[0] in "aeiou" else "a"
                text = word(WORDINGS["presence"], rng, a=article, noun=single, plural=PLURALS[single])
                result[index].append(Question(text, answer, "presence", single))
    return result


def _colors(captions: Sequence[Sequence[str]], rng: random.Random, agreement: int) -> list[Question]:
    said: dict[str, Counter] = defaultdict(Counter)
    for words in captions:
        found = {
            (noun, color if before not in ("and", *COLORS) else "")  # "black and white dog" has no single color
            for before, color, noun in zip(["", *words], words, words[1:], strict=False)
            if color in COLORS and noun in COLORED
        }
        for noun, color in sorted(found):
            said[noun][color] += 1
    result = []
    for noun, colors in said.items():
        color, count = colors.most_common(1)[0]
        if color and count >= agreement and len(colors) == 1:
            is_are = "are" if noun.endswith("s") and not noun.endswith("ss") else "is"
            text = word(WORDINGS["color"], rng, noun=noun, is_are=is_are)
            result.append(Question(text, f"{color.capitalize()}.", "color", SINGULARS.get(noun, noun)))
    return result


def _counts(captions: Sequence[Sequence[str]], rng: random.Random, agreement: int) -> list[Question]:
    said: dict[str, Counter] = defaultdict(Counter)
    for words in captions:
        for index, number in enumerate(words):
            plural = next(
                (word for word in words[index + 1 : index + 4] if word in SINGULARS or word == "people"), None
            )
            if number in NUMBERS[1:] and plural:
                said[plural][number] += 1
    mentioned = Counter(word for words in captions for word in set(words))
    for single, plural in PLURALS.items():  # "one" if most captions have "a dog" and none "dogs"
        singly = sum(any(f" {one} {single} " in f" {' '.join(words)} " for one in ("a", "one")) for words in captions)
        if singly >= 3 and not mentioned[plural] and plural not in said and rng.random() < 0.1:
            said[plural]["one"] = singly
    result = []
    for plural, numbers in said.items():
        number, count = numbers.most_common(1)[0]
        if count >= agreement and len(numbers) == 1:
            text = word(WORDINGS["count"], rng, plural=plural)
            result.append(Question(text, f"{number.capitalize()}.", "count", SINGULARS.get(plural, "person")))
    return result


def _actions(captions: Sequence[Sequence[str]], rng: random.Random) -> list[Question]:
    mentioned = {word for words in captions for word in words}
    doers = [single for single in seen_objects(captions) if single in PEOPLE or single in ANIMALS]
    done = _agreed([answer for word in words if (answer := action_of(word))] for words in captions)
    if len(doers) != 1 or PLURALS[doers[0]] in mentioned or not done:  # of two, it is unclear who acts
        return []
    answer = done.most_common(1)[0][0]
    return [Question(word(WORDINGS["doing"], rng, noun=doers[0]), f"{answer}.", "doing", doers[0])]


def action_of(word: str) -> str | None:
    """ "runs", "running" → "Running"; None for other words."""
    for stem in (word.removesuffix("ing"), word.removesuffix("s"), word.removesuffix("es")):
        if stem != word:
            for candidate in (stem, stem[:-1] if stem[-1:] == stem[-2:-1] else f"{stem}e"):
                if ACTIONS.get(candidate):
                    return ACTIONS[candidate]
    return None


def _people(captions: Sequence[Sequence[str]], rng: random.Random) -> list[Question]:
    """ "A man and two boys." if the captions agree; no question if they name people in several ways."""
    named = _agreed([pair for pair in zip(words, words[1:], strict=False) if _is_person(*pair)] for words in captions)
    nouns = Counter(SINGULARS.get(noun, noun) for _, noun in named)
    if not named or max(nouns.values()) > 1 or len(named) > 2:
        return []
    phrases = [f"{number} {noun}" for number, noun in sorted(named, key=lambda pair: -named[pair])]
    answer = " and ".join(phrases)
    return [Question(word(WORDINGS["who"], rng), f"{answer[0].upper()}{answer[1:]}.", "who", "person")]


def _is_person(number: str, noun: str) -> bool:
    return (number == "a" and noun in PEOPLE) or (number in NUMBERS[1:] and SINGULARS.get(noun) in PEOPLE)


def _places(captions: Sequence[Sequence[str]], rng: random.Random) -> list[Question]:
    said = _agreed([word for word in words if word in PLACES] for words in captions)
    if not said:
        return []
    place, _ = said.most_common(1)[0]
    rivals = said.keys() - {place} - next((group for group in LIKE_PLACES if place in group), set())
    seen = [single for single in seen_objects(captions) if single not in PLACES]
    if rivals or not seen:
        return []
    return [Question(word(WORDINGS["where"], rng, noun=seen[0]), f"{PLACES[place]}.", "where", seen[0])]
