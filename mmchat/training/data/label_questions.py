"""Questions that labels answer, made by rules: what is this, which room, is there a …, how many, what is to the left.

"No" is said only where the labels leave no doubt: of the kinds that were looked for in every picture of a group, and of
a photo with a single label only of what nobody would find beside it (no shark beside a harp). Half of the things denied
are drawn by chance, half are those that most often come with what is there, as POPE's adversarial ones (Li et al. 2023,
arXiv 2305.10355).
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import naming
from .conversations import entry_of
from .labels import Labeled
from .naming import Dictionary, Names, counted, listed, plural, sentence, with_article
from .questions import WORDINGS as CAPTION_WORDINGS
from .questions import word

PRESENCE = tuple(dict.fromkeys(CAPTION_WORDINGS["presence"]))
WORDINGS = {
    "name": (
        "What is this?", "What is this?", "What is it?", "What is shown{shown_or_here}?", "What can be seen here?",
        "What does the photo show?", "What does this picture show?", "Name the main thing{shown}.",
        "Name the thing{shown}.", "What is the main object{shown}?", "What is the main thing{shown}?",
        "What is in the photo?", "What do we have here?", "Tell me what this is.", "Identify the object{shown}.",
        "Can you tell me what this is?", "What would you call this?", "What am I looking at?", "Which thing is this?",
        "What object is this?", "Say what this is.", "What kind of thing is this?", "What is the subject of the photo?",
        "Please name what you see.", "What is this thing called?", "In a few words, what is this?",
        "Do you know what this is?", "What stands out{shown_or_here}?", "This is a picture of what?",
        "What is pictured here?", "Name what is shown.", "What did somebody take a picture of?",
    ),
    "animal": (
        "What kind of animal is this?", "What animal is this?", "Which animal is this?", "Name the animal{shown}.",
        "What animal do you see{shown}?", "Which animal does the photo show?", "What sort of animal is shown here?",
    ),
    "fine": (
        "What kind of {noun} is this?", "Which kind of {noun} is it?", "What sort of {noun} can you see{shown}?",
        "What variety of {noun} is this?",
    ),
    "room": (
        "Which room is this?", "What room is this?", "What kind of room is this?", "Where was this photo taken?",
        "What place is this?", "What kind of place is shown here?", "Where is this?", "Name the room or place{shown}.",
        "Which part of a house does the photo show?", "What place does the picture show?", "Name this place.",
        "Tell me which room or place this is.", "What sort of place do you see?", "Which place can be seen here?",
        "What is this place?", "What would you call this place?", "Identify the room or place{shown}.",
        "Where could this picture have been taken?", "What kind of scene is this?", "What scene does the image show?",
    ),
    "is room": (
        "Is this {a_noun}?", "Is this {a_noun}?", "Does the photo show {a_noun}?", "Is this a picture of {a_noun}?",
        "Would you call this {a_noun}?", "Are we looking at {a_noun}?", "Is {a_noun} shown here?",
        "This is {a_noun}, right?", "Was this photo taken of {a_noun}?", "Do you see {a_noun}?",
    ),
    "how many": CAPTION_WORDINGS["count"],
    "things": (
        "What things can you see{shown}?", "Which things are there{shown}?", "List the things you see.",
        "What objects do you see{shown}?", "What is there to see{shown_or_here}?", "Name the things{shown}.",
        "List the main objects{shown}.", "Which objects can you recognize{shown}?", "What all can you see{shown}?",
        "Tell me what things there are{shown}.",
    ),
    "two things": (
        "Name two things{shown_or_here}.", "Name two things in the picture.", "Name two things you see.",
        "Which two things can you see{shown}?", "Tell me two things that are visible{shown}.",
        "List two objects{shown_or_here}.",
    ),
    "side": (
        "What is to the {side} of {the_noun}?", "What is {side} of {the_noun}{shown}?",
        "What do you see to the {side} of {the_noun}?", "Which thing is to the {side} of {the_noun}?",
        "Name the thing to the {side} of {the_noun}.", "What is on the {side} side of {the_noun}?",
    ),
    "is side": (
        "Is {other} to the {side} of {the_noun}?", "Is {other} left or right of {the_noun}?",
        "On which side of {the_noun} is {other}?",
    ),
    "biggest": (
        "What is the biggest thing{shown}?", "Which thing looks biggest{shown}?", "Name the biggest thing{shown}.",
        "What takes up most of the picture?", "Which object is the largest{shown}?",
        "What is the largest object{shown}?",
    ),
}  # fmt: skip
# Asked only in evaluation, so that it is not the wording that is recognized.
EVALUATION_WORDINGS = {
    "name": (
        "What thing can you recognize?", "What do you call the thing in this photograph?",
        "What has been photographed?", "Which object does this photograph show?",
        "Could you name the thing in front of you?",
    ),
    "room": (
        "What kind of room or place do you see in this photograph?", "Which room or place has been photographed?",
        "What would people call the place in this photograph?", "Could you name the room or place?",
    ),
    "presence": (
        "Would you say there is {a} {noun} in this photograph?", "Could you find {a} {noun} in the photograph?",
        "Is there {a} {noun} to be seen in this photograph?",
    ),
    "how many": (
        "In this photograph, how many {plural} do you count?", "How many {plural} have been photographed?",
        "What number of {plural} does this photograph show?",
    ),
}  # fmt: skip

ROOMS = {
    "childs room": "child's room", "poolroom home": "poolroom", "garage indoor": "garage", "dinette home": "dinette",
    "wine cellar barrel storage": "wine cellar", "wine cellar bottle storage": "wine cellar", "bow window indoor": "",
    "youth hostel": "hostel room", "chicken coop indoor": "chicken coop", "shower": "shower",
}  # fmt: skip
# Rooms that people may take for each other: of these none is denied for another.
LIKE_ROOMS = (
    "bedroom|hotel room|dorm room|child's room|nursery|hostel room|attic|playroom|living room",
    "living room|parlor|game room|playroom|home office|basement|poolroom|dining room|wet bar|attic|"
    "dorm room|hotel room",
    "kitchen|kitchenette|dining room|dinette|pantry|wet bar|utility room",
    "bathroom|shower|laundromat|utility room", "basement|wine cellar|utility room|garage|attic|closet|pantry",
    "stable|chicken coop|garage",
)  # fmt: skip
OTHER_ROOM_NAMES = {
    "living room": ("lounge", "sitting room", "parlor", "den"), "bathroom": ("restroom", "washroom", "toilet", "bath"),
    "poolroom": ("game room", "billiard room", "pool room"), "shower": ("bathroom",), "parlor": ("living room",),
    "child's room": ("bedroom", "kids' room", "children's room"),
    "nursery": ("child's room", "bedroom", "baby's room"), "hotel room": ("bedroom",), "dorm room": ("bedroom",),
    "hostel room": ("bedroom", "dorm room", "hostel"), "home office": ("office", "study"),
    "front of a house": ("house", "home", "house front"), "kitchenette": ("kitchen",),
    "dinette": ("dining room",), "wet bar": ("bar",), "staircase": ("stairs", "stairway", "hallway"),
    "game room": ("poolroom", "playroom"), "dining room": ("dinette",), "closet": ("wardrobe", "walk-in closet"),
}  # fmt: skip

# The main thing of a photo, even with a person beside it.
MAIN = set(
    "dog cat horse cow sheep bird bear elephant giraffe zebra airplane train bus truck motorcycle boat car "
    "bicycle".split()
)
# Seen in photos of anything, so that no single label rules them out.
COMMON = set(
    "person fence chair table lamp car boat ship building house barn tree rock wall rope cup plate bowl pot "
    "bottle ball bench bed sofa bag hat shoe cage sign street beach lakeshore cliff mountain valley sandbar dock "
    "pier window glass clock hay net bucket barrel box crate carton packet stone shop fountain greenhouse truck "
    "bicycle train bus basket chain collar pole nail bird camera tent canoe doormat quilt blanket pillow towel "
    "tub bathtub crib handkerchief".split()
)
TAME = {"dog", "cat", "horse", "bird", "fish", "cow", "sheep", "goat", "pig", "rabbit", "duck", "camel", "elephant"}
TAME |= {"insect", "fly", "bee", "spider", "ant", "butterfly", "parrot", "chicken", "hen", "cock", "buffalo", "person"}
TYPING_ERRORS = {
    "us": "is", "waht": "what", "whats": "what is", "wat": "what", "hwat": "what", "whatis": "what is", "teh": "the",
    "chiar": "chair", "objetcs": "objects", "obejcts": "objects", "objets": "objects", "tabel": "table",
    "colur": "color", "colout": "colour", "lfet": "left", "rigth": "right", "ther": "there", "si": "is",
    "alot": "a lot", "refridgerator": "refrigerator", "televison": "television", "infront": "in front",
}  # fmt: skip
MOST = 5  # the highest number asked for
REPEATS = 3  # a rare number is asked for in so many wordings at most
BESIDE = 0.15  # of the picture's width between two things, one of which is to the left of the other


@dataclass(frozen=True)
class LabelQuestion:
    """A question about a picture, its answer, and other right answers in lower case."""

    text: str
    answer: str
    kind: str
    accepted: tuple[str, ...] = ()
    subject: str = ""  # what a question is about that is affirmed as often as denied


class Asker:
    """Everything that can be asked about a collection of labeled pictures.

    Args:
        evaluation: ask in wordings of their own, and only the kinds that are measured.
    """

    def __init__(
        self,
        pictures: Sequence[Labeled],
        rng: random.Random,
        dictionary: Dictionary | None = None,
        evaluation: bool = False,
    ):
        self.pictures, self.rng, self.evaluation = pictures, rng, evaluation
        self.dictionary = dictionary or Dictionary()
        labels = {(picture.label, picture.synset) for picture in pictures if picture.label}
        names = {(label, synset): self._names_of_label(label, synset) for label, synset in labels}
        self.names = [names.get((picture.label, picture.synset)) for picture in pictures]
        self.objects = [self._readable(picture) for picture in pictures]
        self.kinds: dict[str, set[str]] = defaultdict(set)  # looked for in every picture of a group
        for picture, objects in zip(pictures, self.objects, strict=True):
            self.kinds[picture.group] |= objects.keys()

    def ask(self) -> list[list[LabelQuestion]]:
        """The questions of each picture, in the order of the pictures."""
        found: list[list[LabelQuestion]] = [[] for _ in self.pictures]
        for rule in (self._presence, self._rooms_or_not, self._numbers):
            for number, question in rule():
                found[number].append(question)
        for number, picture in enumerate(self.pictures):
            found[number] += self._name(number)
            found[number] += self._room(picture)
            found[number] += self._people_asked(picture)
            if not self.evaluation:
                found[number] += self._things(number)
                found[number] += self._boxes(picture)
        return found

    def _word(self, kind: str, **parts: str) -> str:
        if self.evaluation:
            return self.rng.choice(EVALUATION_WORDINGS[kind]).format(**parts)
        return word(WORDINGS[kind], self.rng, **parts)

    def _names_of_label(self, label: str, synset: str) -> Names:
        return self.dictionary.names_of(label, synset or self.dictionary.synset_of(label))

    @staticmethod
    def _readable(picture: Labeled) -> dict[str, int | None]:
        """Its objects under the names that people use; a crowd of one of two merged kinds makes a crowd."""
        found: dict[str, int | None] = {}
        for name, count in (picture.objects or {}).items():
            name = naming.readable(name)
            before = found.get(name, 0)
            found[name] = None if count is None or before is None else before + count
        return found

    # What it is

    def _name(self, number: int) -> list[LabelQuestion]:
        names = self.names[number]
        if names is None:
            return self._main_object(number)
        right = tuple(naming.accepted(names))
        if self.evaluation:
            return [LabelQuestion(self._word("name"), _both_levels(names), "name", right)]
        coarse = names.animal and self.rng.random() < 1 / 3
        if coarse:
            question = LabelQuestion(self._word("animal"), sentence(with_article(names.basic)), "name", right)
        else:
            question = LabelQuestion(self._word("name"), _both_levels(names), "name", right)
        return [question, *self._variety(number, names)]

    def _variety(self, number: int, names: Names) -> list[LabelQuestion]:
        fine = self.pictures[number].fine
        if fine and fine.lower() not in (
            names.name.lower(),
            self.pictures[number].label.lower(),
            f"{names.name}s".lower(),
        ):
            return [LabelQuestion(self._word("fine", noun=names.name), f"{fine}.", "name")]
        if not names.says_basic and names.animal:
            answer = sentence(with_article(names.name))
            return [LabelQuestion(self._word("fine", noun=names.basic), answer, "name")]
        return []

    def _main_object(self, number: int) -> list[LabelQuestion]:
        """The only kind that is there, or the only one besides people that a photo is taken for."""
        objects = self.objects[number]
        main = list(objects) if len(objects) == 1 else [name for name in objects if name != "person"]
        if len(main) != 1 or (len(objects) > 1 and main[0] not in MAIN):
            return []
        answer = sentence(counted(main[0], objects[main[0]]))
        right = tuple(naming.accepted(self.dictionary.names_of(main[0])))
        return [LabelQuestion(self._word("name"), answer, "name", right)]

    # Where it is

    def _room(self, picture: Labeled) -> list[LabelQuestion]:
        room = room_name(picture.scene)
        if not room:
            return []
        right = tuple(dict.fromkeys((room.lower(), *OTHER_ROOM_NAMES.get(room, ()))))
        return [LabelQuestion(self._word("room"), sentence(_a_room(room)), "room", right)]

    def _rooms_or_not(self) -> Iterator[tuple[int, LabelQuestion]]:
        """ "Is this a kitchen?", each room as often affirmed as denied."""
        if self.evaluation:
            return
        rooms = [room_name(picture.scene) for picture in self.pictures]
        for room in sorted(set(rooms) - {""}):
            affirmed = [number for number, other in enumerate(rooms) if other == room]
            denied = [number for number, other in enumerate(rooms) if other and not may_be_taken_for(room, other)]
            for number, answer in self._evenly(affirmed, denied):
                text = self._word("is room", a_noun=_a_room(room))
                yield number, LabelQuestion(text, answer, "is room", subject=room)

    def _evenly(self, affirmed: Sequence[int], denied: Sequence[int]) -> list[tuple[int, str]]:
        count = min(len(affirmed), len(denied))
        drawn = [(number, "Yes.") for number in self.rng.sample(affirmed, count)]
        return drawn + [(number, "No.") for number in self.rng.sample(denied, count)]

    # Whether it is there

    def _presence(self) -> Iterator[tuple[int, LabelQuestion]]:
        """Each name affirmed as often as denied; of those denied, half are likely beside what is there."""
        affirmed: dict[str, list[int]] = defaultdict(list)
        all_names: dict[str, Names] = {}
        for number, objects in enumerate(self.objects):
            for name in objects:
                affirmed[name].append(number)
                all_names.setdefault(name, self.dictionary.names_of(name))
            names = self.names[number]
            for name in dict.fromkeys((names.name, names.basic)) if names else ():
                if " or " not in name:
                    affirmed[name].append(number)
                    all_names[name] = names if name == names.name else Names(name, name, names.group)
        together = self._together()
        for name in sorted(affirmed):
            denied = [number for number in range(len(self.pictures)) if self.may_deny(number, all_names[name])]
            count = min(len(affirmed[name]), len(denied))
            likely = self._likeliest(name, denied, count // 2, together)
            by_chance = self.rng.sample(sorted(set(denied) - set(likely)), count - len(likely))
            there = self.rng.sample(affirmed[name], count)
            for place, number in enumerate(there):
                yield number, self._is_there(name, "Yes.", adversarial=place < len(likely))
            for number in likely + by_chance:
                yield number, self._is_there(name, "No.", adversarial=number in likely)

    def _together(self) -> dict[str, Counter]:
        """How often each thing is in a picture with each other one, as a share of the pictures with it."""
        single: Counter = Counter()
        pairs: dict[str, Counter] = defaultdict(Counter)
        for objects in self.objects:
            for one in objects:
                single[one] += 1
                pairs[one].update(other for other in objects if other != one)
        return {
            one: Counter({other: count / single[one] for other, count in others.items()})
            for one, others in pairs.items()
        }

    def _likeliest(self, name: str, denied: Sequence[int], count: int, together: dict[str, Counter]) -> list[int]:
        """Of the pictures without a thing, those whose other things it most often comes with."""
        scores = {
            number: max((together.get(other, {}).get(name, 0) for other in self.objects[number]), default=0)
            for number in denied
        }
        mixed = self.rng.sample(denied, len(denied))
        best = sorted((number for number in mixed if scores[number] > 0), key=lambda number: -scores[number])
        return sorted(self.rng.sample(best[: 2 * count], min(count, len(best[: 2 * count]))))

    def may_deny(self, number: int, asked: Names) -> bool:
        """Whether what is said of a picture leaves no doubt that there is no such thing."""
        picture, names = self.pictures[number], self.names[number]
        if picture.objects is not None:
            return asked.name in self.kinds[picture.group] and asked.name not in self.objects[number]
        if names is None or not names.group or not asked.group or names.group == asked.group:
            return False
        if {asked.name, asked.basic} & {names.name, names.basic, *names.others}:
            return False
        if names.animal and asked.animal:
            return not {"insect", "bird"} >= {names.group, asked.group}  # birds eat insects
        if names.animal:
            return asked.group == "thing" and not _is_common(asked)
        return names.group in ("thing", "food") and asked.animal and not {asked.basic, asked.name} & TAME

    def _is_there(self, name: str, answer: str, adversarial: bool) -> LabelQuestion:
        kind = "presence adversarial" if adversarial else "presence"
        several = naming.is_plural(name)
        some = "some" if naming.is_mass(name) else "any" if several else with_article(name).split(" ")[0]
        wordings = [
            text
            for text in (EVALUATION_WORDINGS["presence"] if self.evaluation else PRESENCE)
            if _fits(text, several, naming.is_mass(name))
        ]
        parts = {"a": some, "noun": name, "plural": plural(name)}
        text = self.rng.choice(wordings).format(**parts) if self.evaluation else word(wordings, self.rng, **parts)
        return LabelQuestion(text, answer, kind, subject=name)

    # How many there are

    def _numbers(self) -> Iterator[tuple[int, LabelQuestion]]:
        """How many of a kind, each number from one to MOST asked for equally often as far as they reach."""
        by_count: dict[int, list[tuple[int, str]]] = {count: [] for count in range(1, MOST + 1)}
        for number, objects in enumerate(self.objects):
            for name, count in objects.items():
                if count in by_count and not naming.is_mass(name) and not naming.is_plural(name):
                    by_count[count].append((number, name))
        present = [len(places) for places in by_count.values() if places]
        wanted = REPEATS * min(present, default=0)
        for count, places in by_count.items():
            mixed = self.rng.sample(places, len(places))
            for turn, (number, name) in enumerate((mixed * REPEATS)[:wanted]):
                text = self._how_many("people" if name == "person" else plural(name), turn // len(mixed))
                answer = naming.NUMBERS[count]
                yield number, LabelQuestion(text, f"{answer.capitalize()}.", "how many", (answer, str(count)))

    def _how_many(self, things: str, repeat: int) -> str:
        if self.evaluation:  # asked again, the question must not be the same
            return EVALUATION_WORDINGS["how many"][repeat].format(plural=things)
        return word(WORDINGS["how many"], self.rng, plural=things)

    # Several things

    def _things(self, number: int) -> list[LabelQuestion]:
        objects = self.objects[number]
        if not 2 <= len(objects) <= 5:
            return []
        everything = listed([counted(name, count) for name, count in objects.items()])
        two = listed([with_article(name) for name in self.rng.sample(sorted(objects), 2)])
        return [
            LabelQuestion(self._word("things"), sentence(everything), "things"),
            LabelQuestion(self._word("two things"), sentence(two), "two things"),
        ]

    def _boxes(self, picture: Labeled) -> list[LabelQuestion]:
        """Left of, right of, and the biggest: of things of which there is one."""
        counts = Counter(box.name for box in picture.boxes)
        single = [box for box in picture.boxes if counts[box.name] == 1]
        found = []
        width = max((box.right for box in picture.boxes), default=0)
        pairs = [
            (left, right) for left in single for right in single if right.left - left.right > BESIDE * width
        ]  # nothing of the one reaches the other
        if pairs:
            pair = self.rng.choice(pairs)
            found += self._sides(picture, *pair)
        by_area = sorted(picture.boxes, key=lambda box: -box.area)
        if len(by_area) > 1 and by_area[0].area > 2 * by_area[1].area:
            answer = sentence(with_article(naming.readable(by_area[0].name)))
            found.append(LabelQuestion(self._word("biggest"), answer, "biggest"))
        return found

    def _sides(self, picture: Labeled, left, right) -> Iterator[LabelQuestion]:
        side = self.rng.choice(("left", "right"))
        asked, other = (right, left) if side == "left" else (left, right)
        asked_name, other_name = naming.readable(asked.name), naming.readable(other.name)
        beside = [
            box
            for box in picture.boxes
            if box is not asked and (box.right < asked.left if side == "left" else box.left > asked.right)
        ]
        if len(beside) == 1:  # else another thing would be as right
            text = self._word("side", side=side, the_noun=f"the {asked_name}")
            yield LabelQuestion(text, sentence(with_article(other_name)), "side")
        claimed = self.rng.choice(("left", "right"))
        text = f"Is the {other_name} to the {claimed} of the {asked_name}?"
        yield LabelQuestion(text, "Yes." if claimed == side else "No.", "is side")
        text = f"On which side of the {asked_name} is the {other_name}?"
        yield LabelQuestion(text, f"On the {side}.", "which side")

    # What people asked

    def _people_asked(self, picture: Labeled) -> list[LabelQuestion]:
        found = []
        for question, answer in picture.questions:
            things = [thing.strip().replace("_", " ") for thing in answer.split(",") if thing.strip()]
            if not things or (self.evaluation and len(things) > 1):
                continue
            said = [_number_word(thing) for thing in things]
            right = tuple(dict.fromkeys(form for thing in (*things, *said) for form in (thing, *_other_number(thing))))
            found.append(LabelQuestion(tidy_question(question), sentence(listed(said)), "daquar", right))
        return found


def _both_levels(names: Names) -> str:
    """ "A hammerhead, a kind of shark."; just "A tiger shark." where the name says it."""
    named = sentence(with_article(names.name))
    if names.says_basic or names.basic in names.name.lower().split():
        return named
    return f"{named[:-1]}, a kind of {names.basic}."


def _fits(text: str, several: bool, mass: bool) -> bool:
    """Whether a wording asks for shorts ("any shorts", never "a shorts") or for milk ("some milk", never "milks")."""
    if several:
        return "{plural}" in text or "find {a}" in text or "see {a}" in text
    if mass:
        return "{plural}" not in text and "right?" not in text and "true that" not in text
    return "any {noun}" not in text


def _is_common(names: Names) -> bool:
    words = {names.name, names.basic, names.name.split(" ")[-1], *names.others}
    return bool(words & COMMON)


def _a_room(room: str) -> str:
    return f"the {room}" if room == "front of a house" else with_article(room)


def _number_word(text: str) -> str:
    return naming.NUMBERS[int(text)] if text.isdigit() and int(text) < len(naming.NUMBERS) else text


def _other_number(word: str) -> list[str]:
    """The plural of one thing, the one of several; nothing of a number or a color."""
    if not re.fullmatch(r"[a-z ]+", word) or word in naming.NUMBERS or word in COLORS:
        return []
    single = naming._inflect().singular_noun(word)
    return [single if single else plural(word)]


COLORS = set(
    "white black brown red blue green yellow orange pink purple gray grey tan beige silver gold maroon".split()
)


def room_name(scene: str) -> str:
    """What people call a dataset's scene; empty where it is none that they would name."""
    return ROOMS.get(scene, scene)


def may_be_taken_for(room: str, other: str) -> bool:
    """Whether nobody can be sure that a picture of the one is not one of the other."""
    return room == other or any({room, other} <= set(rooms.split("|")) for rooms in LIKE_ROOMS)


def tidy_question(question: str) -> str:
    """A capital first, one question mark last, frequent typing errors put right."""
    text = re.sub(r"\s+", " ", question).strip().rstrip(" ?.") + "?"
    text = re.sub(r"[A-Za-z]+", lambda found: TYPING_ERRORS.get(found[0], found[0]), text)
    text = re.sub(r"\b(in the )?image\s?\d+\b", lambda found: "in the picture" if found[1] else "the picture", text)
    text = re.sub(r"\b(\w+) \1\b", r"\1", text)
    return text[:1].upper() + text[1:]


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
