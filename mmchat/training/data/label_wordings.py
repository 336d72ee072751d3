"""Wordings of questions about labels: templates, and cleanup of questions that people wrote."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from . import naming
from .naming import plural, with_article
from .questions import WORDINGS as CAPTION_WORDINGS
from .questions import word

WORDINGS = {
    "presence": tuple(dict.fromkeys(CAPTION_WORDINGS["presence"])),
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
    "biggest": (
        "What is the biggest thing{shown}?", "Which thing looks biggest{shown}?", "Name the biggest thing{shown}.",
        "What takes up most of the picture?", "Which object is the largest{shown}?",
        "What is the largest object{shown}?",
    ),
}  # fmt: skip
# Used in evaluation only, so that recognizing a training wording does not help.
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
IS_SIDE, WHICH_SIDE = "Is the {other} to the {side} of the {noun}?", "On which side of the {noun} is the {other}?"
TYPING_ERRORS = {
    "us": "is", "waht": "what", "whats": "what is", "wat": "what", "hwat": "what", "whatis": "what is", "teh": "the",
    "chiar": "chair", "objetcs": "objects", "obejcts": "objects", "objets": "objects", "tabel": "table",
    "colur": "color", "colout": "colour", "lfet": "left", "rigth": "right", "ther": "there", "si": "is",
    "alot": "a lot", "refridgerator": "refrigerator", "televison": "television", "infront": "in front",
}  # fmt: skip


class Wordings:
    """Words questions with random templates.

    Args:
        evaluation: use the templates that training never uses.
    """

    def __init__(self, rng: random.Random, evaluation: bool = False):
        self.rng, self.evaluation = rng, evaluation

    def ask(self, kind: str, **parts: str) -> str:
        """A question of a kind, such as "name" or "room"."""
        return self._fill((EVALUATION_WORDINGS if self.evaluation else WORDINGS)[kind], **parts)

    def presence(self, name: str) -> str:
        """A question whether the picture shows a thing."""
        several, mass = naming.is_plural(name), naming.is_mass(name)
        some = "some" if mass else "any" if several else with_article(name).split(" ")[0]
        templates = (EVALUATION_WORDINGS if self.evaluation else WORDINGS)["presence"]
        fitting = [text for text in templates if _fits(text, several, mass)]
        return self._fill(fitting, a=some, noun=name, plural=plural(name))

    def how_many(self, things: str, repeat: int) -> str:
        """A question for a count; ``repeat`` counts earlier questions about the same things and picture."""
        if self.evaluation:  # every repeat needs another wording
            return EVALUATION_WORDINGS["how many"][repeat].format(plural=things)
        return self.ask("how many", plural=things)

    def _fill(self, templates: Sequence[str], **parts: str) -> str:
        if self.evaluation:
            return self.rng.choice(templates).format(**parts)
        return word(templates, self.rng, **parts)


def _fits(text: str, several: bool, mass: bool) -> bool:
    """Whether a wording fits a plural noun ("any shorts", never "a shorts") or a mass noun (never "milks")."""
    if several:
        return "{plural}" in text or "find {a}" in text or "see {a}" in text
    if mass:
        return "{plural}" not in text and "right?" not in text and "true that" not in text
    return "any {noun}" not in text


def tidy_question(question: str) -> str:
    """Capitalizes, ends with one question mark, and corrects frequent typing errors."""
    text = re.sub(r"\s+", " ", question).strip().rstrip(" ?.") + "?"
    text = re.sub(r"[A-Za-z]+", lambda found: TYPING_ERRORS.get(found[0], found[0]), text)
    text = re.sub(r"\b(in the )?image\s?\d+\b", lambda found: "in the picture" if found[1] else "the picture", text)
    text = re.sub(r"\b(\w+) \1\b", r"\1", text)
    return text[:1].upper() + text[1:]
