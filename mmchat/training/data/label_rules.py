"""The rules that turn labels into questions and answers: what is this, which room, is there a …, how many, where.

A question is answered "no" only for kinds that were annotated in every picture of a group, and for things that a
photo's single label rules out. Half of the negatives are random; the other half are adversarial, as in POPE (Li et al.
2023, arXiv 2305.10355): things that often occur together with what the picture shows.
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
MAX_COUNT = 5  # the highest count that is asked for
REPEATS = 3  # maximum wordings for one count question, so that rare counts are asked as often as frequent ones
MIN_GAP = 0.15  # minimum gap between two things side by side, as a fraction of the picture's width


@dataclass(frozen=True)
class LabelQuestion:
    """A question about a picture and its answer."""

    text: str
    answer: str
    kind: str
    accepted: tuple[str, ...] = ()  # all right answers in lower case; () if `answer` is the only one
    subject: str = ""  # of a yes/no question; each subject has as many yes as no answers


class Asker:
    """Asks every question that the labels of a collection of pictures answer.

    Args:
        evaluation: use wordings that training never uses, and only the kinds that are measured.
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
        self.kinds: dict[str, set[str]] = defaultdict(set)  # kinds annotated in every picture of a group
        for picture, objects in zip(pictures, self.objects, strict=True):
            self.kinds[picture.group] |= objects.keys()

    def ask(self) -> list[list[LabelQuestion]]:
        """The questions of each picture, in the order of the pictures."""
        found: list[list[LabelQuestion]] = [[] for _ in self.pictures]
        for rule in (self._presence, self._rooms_or_not, self._numbers):
            for index, question in rule():
                found[index].append(question)
        for index, picture in enumerate(self.pictures):
            found[index] += self._name(index)
            found[index] += self._room(picture)
            found[index] += self._people_asked(picture)
            if not self.evaluation:
                found[index] += self._things(index)
                found[index] += self._boxes(picture)
        return found

    @staticmethod
    def _readable(picture: Labeled) -> dict[str, int | None]:
        """The objects under their everyday names. Merged kinds add up; None, a crowd, stays None."""
        found: dict[str, int | None] = {}
        for name, count in (picture.objects or {}).items():
            name = naming.readable(name)
            before = found.get(name, 0)
            found[name] = None if count is None or before is None else before + count
        return found

    # What is this?

    def _name(self, index: int) -> list[LabelQuestion]:
        names = self.names[index]
        if names is None:
            return self._main_object(index)
        right = tuple(naming.accepted(names))
        if not self.evaluation and names.animal and self.rng.random() < 1 / 3:
            question = LabelQuestion(self.wordings.ask("animal"), sentence(with_article(names.basic)), "name", right)
        else:
            question = LabelQuestion(self.wordings.ask("name"), _both_levels(names), "name", right)
        return [question, *([] if self.evaluation else self._variety(index, names))]

    def _variety(self, index: int, names: Names) -> list[LabelQuestion]:
        fine = self.pictures[index].fine
        known = (names.name, f"{names.name}s", self.pictures[index].label)
        if fine and fine.lower() not in map(str.lower, known):
            return [LabelQuestion(self.wordings.ask("fine", noun=names.name), f"{fine}.", "name")]
        if not names.says_basic and names.animal:
            answer = sentence(with_article(names.name))
            return [LabelQuestion(self.wordings.ask("fine", noun=names.basic), answer, "name")]
        return []

    def _main_object(self, index: int) -> list[LabelQuestion]:
        """The only kind of object, or the only one besides people if it is a typical main object."""
        objects = self.objects[index]
        main = list(objects) if len(objects) == 1 else [name for name in objects if name != "person"]
        if len(main) != 1 or (len(objects) > 1 and main[0] not in MAIN):
            return []
        answer = sentence(counted(main[0], objects[main[0]]))
        right = tuple(naming.accepted(self.dictionary.names_of(main[0])))
        return [LabelQuestion(self.wordings.ask("name"), answer, "name", right)]

    # Which room is this?

    def _room(self, picture: Labeled) -> list[LabelQuestion]:
        room = room_name(picture.scene)
        if not room:
            return []
        right = tuple(dict.fromkeys((room.lower(), *OTHER_ROOM_NAMES.get(room, ()))))
        return [LabelQuestion(self.wordings.ask("room"), sentence(a_room(room)), "room", right)]

    def _rooms_or_not(self) -> Iterator[tuple[int, LabelQuestion]]:
        """ "Is this a kitchen?", with as many yes as no answers for each room."""
        if self.evaluation:
            return
        rooms = [room_name(picture.scene) for picture in self.pictures]
        for room in sorted(set(rooms) - {""}):
            yes = [index for index, other in enumerate(rooms) if other == room]
            no = [index for index, other in enumerate(rooms) if other and not may_be_taken_for(room, other)]
            for index, answer in self._balanced(yes, no):
                text = self.wordings.ask("is room", a_noun=a_room(room))
                yield index, LabelQuestion(text, answer, "is room", subject=room)

    def _balanced(self, yes: Sequence[int], no: Sequence[int]) -> list[tuple[int, str]]:
        """Equally many random pictures for each answer."""
        count = min(len(yes), len(no))
        sampled = [(index, "Yes.") for index in self.rng.sample(yes, count)]
        return sampled + [(index, "No.") for index in self.rng.sample(no, count)]

    # Is there a …?

    def _presence(self) -> Iterator[tuple[int, LabelQuestion]]:
        """As many yes as no answers for each name; half of the no answers are adversarial."""
        positives: dict[str, list[int]] = defaultdict(list)
        all_names: dict[str, Names] = {}
        for index, objects in enumerate(self.objects):
            for name in objects:
                positives[name].append(index)
                all_names.setdefault(name, self.dictionary.names_of(name))
            names = self.names[index]
            for name in dict.fromkeys((names.name, names.basic)) if names else ():
                if " or " not in name:
                    positives[name].append(index)
                    all_names[name] = names if name == names.name else Names(name, name, names.group)
        cooccurrence = self._cooccurrence()
        for name in sorted(positives):
            negatives = [index for index in range(len(self.pictures)) if self.may_deny(index, all_names[name])]
            count = min(len(positives[name]), len(negatives))
            adversarial = self._adversarial(name, negatives, count // 2, cooccurrence)
            others = self.rng.sample(sorted(set(negatives) - set(adversarial)), count - len(adversarial))
            for position, index in enumerate(self.rng.sample(positives[name], count)):
                yield index, self._is_there(name, "Yes.", adversarial=position < len(adversarial))
            for index in adversarial + others:
                yield index, self._is_there(name, "No.", adversarial=index in adversarial)

    def _cooccurrence(self) -> dict[str, Counter]:
        """For each thing, the fraction of its pictures that also show each other thing."""
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

    def _adversarial(
        self, name: str, negatives: Sequence[int], count: int, cooccurrence: dict[str, Counter]
    ) -> list[int]:
        """The pictures without a thing whose objects most often occur together with it."""
        scores = {
            index: max((cooccurrence.get(other, {}).get(name, 0) for other in self.objects[index]), default=0)
            for index in negatives
        }
        shuffled = self.rng.sample(negatives, len(negatives))
        best = sorted((index for index in shuffled if scores[index] > 0), key=lambda index: -scores[index])
        return sorted(self.rng.sample(best[: 2 * count], min(count, len(best[: 2 * count]))))

    def may_deny(self, index: int, asked: Names) -> bool:
        """Whether the labels of a picture leave no doubt that it does not show a thing."""
        picture, names = self.pictures[index], self.names[index]
        if picture.objects is not None:
            return asked.name in self.kinds[picture.group] and asked.name not in self.objects[index]
        return names is not None and rules_out(names, asked)

    def _is_there(self, name: str, answer: str, adversarial: bool) -> LabelQuestion:
        kind = "presence adversarial" if adversarial else "presence"
        return LabelQuestion(self.wordings.presence(name), answer, kind, subject=name)

    # How many …?

    def _numbers(self) -> Iterator[tuple[int, LabelQuestion]]:
        """Asks for the count of a kind, each count from 1 to MAX_COUNT equally often as far as the data allows."""
        by_count: dict[int, list[tuple[int, str]]] = {count: [] for count in range(1, MAX_COUNT + 1)}
        for index, objects in enumerate(self.objects):
            for name, count in objects.items():
                if count in by_count and not naming.is_mass(name) and not naming.is_plural(name):
                    by_count[count].append((index, name))
        present = [len(found) for found in by_count.values() if found]
        wanted = REPEATS * min(present, default=0)
        for count, found in by_count.items():
            shuffled = self.rng.sample(found, len(found))
            for turn, (index, name) in enumerate((shuffled * REPEATS)[:wanted]):
                text = self.wordings.how_many("people" if name == "person" else plural(name), turn // len(shuffled))
                answer = naming.NUMBERS[count]
                yield index, LabelQuestion(text, f"{answer.capitalize()}.", "how many", (answer, str(count)))

    # Lists of things, left and right, the biggest

    def _things(self, index: int) -> list[LabelQuestion]:
        objects = self.objects[index]
        if not 2 <= len(objects) <= 5:
            return []
        everything = listed([counted(name, count) for name, count in objects.items()])
        two = listed([with_article(name) for name in self.rng.sample(sorted(objects), 2)])
        return [
            LabelQuestion(self.wordings.ask("things"), sentence(everything), "things"),
            LabelQuestion(self.wordings.ask("two things"), sentence(two), "two things"),
        ]

    def _boxes(self, picture: Labeled) -> list[LabelQuestion]:
        """Left and right, between things that occur once, and the biggest thing."""
        counts = Counter(box.name for box in picture.boxes)
        single = [box for box in picture.boxes if counts[box.name] == 1]
        found = []
        width = max((box.right for box in picture.boxes), default=0)
        pairs = [
            (left, right) for left in single for right in single if right.left - left.right > MIN_GAP * width
        ]  # without horizontal overlap
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
        if len(beside) == 1:  # otherwise several answers would be right
            text = self.wordings.ask("side", side=side, the_noun=f"the {asked_name}")
            yield LabelQuestion(text, sentence(with_article(other_name)), "side")
        claimed = self.rng.choice(("left", "right"))
        text = IS_SIDE.format(other=other_name, side=claimed, noun=asked_name)
        yield LabelQuestion(text, "Yes." if claimed == side else "No.", "is side")
        text = WHICH_SIDE.format(other=other_name, noun=asked_name)
        yield LabelQuestion(text, f"On the {side}.", "which side")

    # Questions written by people

    def _people_asked(self, picture: Labeled) -> list[LabelQuestion]:
        found = []
        for question, answer in picture.questions:
            things = [thing.strip().replace("_", " ") for thing in answer.split(",") if thing.strip()]
            if not things or (self.evaluation and len(things) > 1):
                continue
            spelled = [_number_word(thing) for thing in things]
            forms = (form for thing in (*things, *spelled) for form in (thing, *_other_number(thing)))
            right = tuple(dict.fromkeys(forms))
            found.append(LabelQuestion(tidy_question(question), sentence(listed(spelled)), "daquar", right))
        return found


def _both_levels(names: Names) -> str:
    """ "A hammerhead, a kind of shark."; only "A tiger shark." if the name contains the kind."""
    named = sentence(with_article(names.name))
    if names.says_basic or names.basic in names.name.lower().split():
        return named
    return f"{named[:-1]}, a kind of {names.basic}."


def _number_word(text: str) -> str:
    return naming.NUMBERS[int(text)] if text.isdigit() and int(text) < len(naming.NUMBERS) else text


def _other_number(word: str) -> list[str]:
    """The plural of a singular noun or the singular of a plural; nothing for a number or a color."""
    if not re.fullmatch(r"[a-z ]+", word) or word in naming.NUMBERS or word in COLORS:
        return []
    single = naming.inflector().singular_noun(word)
    return [single if single else plural(word)]
