"""What is asked about labeled pictures and what is answered: what is this, which room, is there a …, how many, where.

"No" is said only of the kinds that were looked for in every picture of a group, and of what the single label of a photo
rules out. Half of the things denied are drawn by chance, half are those that most often come with what is there, as
POPE's adversarial ones (Li et al. 2023, arXiv 2305.10355).
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import naming
from .label_facts import MAIN, OTHER_ROOM_NAMES, a_room, may_be_taken_for, room_name, rules_out
from .label_wordings import IS_SIDE, WHICH_SIDE, Wordings, tidy_question
from .labels import Labeled
from .naming import Dictionary, Names, counted, listed, plural, sentence, with_article

COLORS = set(
    "white black brown red blue green yellow orange pink purple gray grey tan beige silver gold maroon".split()
)
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
        self.wordings = Wordings(rng, evaluation)
        self.dictionary = dictionary or Dictionary()
        labels = {(picture.label, picture.synset) for picture in pictures if picture.label}
        look_up, synset_of = self.dictionary.names_of, self.dictionary.synset_of
        names = {(label, synset): look_up(label, synset or synset_of(label)) for label, synset in labels}
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
        if not self.evaluation and names.animal and self.rng.random() < 1 / 3:
            question = LabelQuestion(self.wordings.ask("animal"), sentence(with_article(names.basic)), "name", right)
        else:
            question = LabelQuestion(self.wordings.ask("name"), _both_levels(names), "name", right)
        return [question, *([] if self.evaluation else self._variety(number, names))]

    def _variety(self, number: int, names: Names) -> list[LabelQuestion]:
        fine = self.pictures[number].fine
        said = (names.name, f"{names.name}s", self.pictures[number].label)
        if fine and fine.lower() not in map(str.lower, said):
            return [LabelQuestion(self.wordings.ask("fine", noun=names.name), f"{fine}.", "name")]
        if not names.says_basic and names.animal:
            answer = sentence(with_article(names.name))
            return [LabelQuestion(self.wordings.ask("fine", noun=names.basic), answer, "name")]
        return []

    def _main_object(self, number: int) -> list[LabelQuestion]:
        """The only kind that is there, or the only one besides people that a photo is taken for."""
        objects = self.objects[number]
        main = list(objects) if len(objects) == 1 else [name for name in objects if name != "person"]
        if len(main) != 1 or (len(objects) > 1 and main[0] not in MAIN):
            return []
        answer = sentence(counted(main[0], objects[main[0]]))
        right = tuple(naming.accepted(self.dictionary.names_of(main[0])))
        return [LabelQuestion(self.wordings.ask("name"), answer, "name", right)]

    # Where it is

    def _room(self, picture: Labeled) -> list[LabelQuestion]:
        room = room_name(picture.scene)
        if not room:
            return []
        right = tuple(dict.fromkeys((room.lower(), *OTHER_ROOM_NAMES.get(room, ()))))
        return [LabelQuestion(self.wordings.ask("room"), sentence(a_room(room)), "room", right)]

    def _rooms_or_not(self) -> Iterator[tuple[int, LabelQuestion]]:
        """ "Is this a kitchen?", each room as often affirmed as denied."""
        if self.evaluation:
            return
        rooms = [room_name(picture.scene) for picture in self.pictures]
        for room in sorted(set(rooms) - {""}):
            affirmed = [number for number, other in enumerate(rooms) if other == room]
            denied = [number for number, other in enumerate(rooms) if other and not may_be_taken_for(room, other)]
            for number, answer in self._evenly(affirmed, denied):
                text = self.wordings.ask("is room", a_noun=a_room(room))
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
        return names is not None and rules_out(names, asked)

    def _is_there(self, name: str, answer: str, adversarial: bool) -> LabelQuestion:
        kind = "presence adversarial" if adversarial else "presence"
        return LabelQuestion(self.wordings.presence(name), answer, kind, subject=name)

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
                text = self.wordings.how_many("people" if name == "person" else plural(name), turn // len(mixed))
                answer = naming.NUMBERS[count]
                yield number, LabelQuestion(text, f"{answer.capitalize()}.", "how many", (answer, str(count)))

    # Several things

    def _things(self, number: int) -> list[LabelQuestion]:
        objects = self.objects[number]
        if not 2 <= len(objects) <= 5:
            return []
        everything = listed([counted(name, count) for name, count in objects.items()])
        two = listed([with_article(name) for name in self.rng.sample(sorted(objects), 2)])
        return [
            LabelQuestion(self.wordings.ask("things"), sentence(everything), "things"),
            LabelQuestion(self.wordings.ask("two things"), sentence(two), "two things"),
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
            found.append(LabelQuestion(self.wordings.ask("biggest"), answer, "biggest"))
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
            text = self.wordings.ask("side", side=side, the_noun=f"the {asked_name}")
            yield LabelQuestion(text, sentence(with_article(other_name)), "side")
        claimed = self.rng.choice(("left", "right"))
        text = IS_SIDE.format(other=other_name, side=claimed, noun=asked_name)
        yield LabelQuestion(text, "Yes." if claimed == side else "No.", "is side")
        text = WHICH_SIDE.format(other=other_name, noun=asked_name)
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


def _number_word(text: str) -> str:
    return naming.NUMBERS[int(text)] if text.isdigit() and int(text) < len(naming.NUMBERS) else text


def _other_number(word: str) -> list[str]:
    """The plural of one thing, the one of several; nothing of a number or a color."""
    if not re.fullmatch(r"[a-z ]+", word) or word in naming.NUMBERS or word in COLORS:
        return []
    single = naming._inflect().singular_noun(word)
    return [single if single else plural(word)]
