"""Facts about rooms and things beyond their labels: synonyms, and what a label rules out.

A question is answered "no" only if the labels leave no doubt. A photo with a single label denies only things that
nobody would find next to it, such as a shark next to a harp.
"""

from __future__ import annotations

from .naming import Names, with_article

ROOMS = {
    "childs room": "child's room", "poolroom home": "poolroom", "garage indoor": "garage", "dinette home": "dinette",
    "wine cellar barrel storage": "wine cellar", "wine cellar bottle storage": "wine cellar", "bow window indoor": "",
    "youth hostel": "hostel room", "chicken coop indoor": "chicken coop",
}  # fmt: skip
# Rooms that people may confuse: a picture of one never answers "no" to another of the same group.
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

# The main object of a photo, even if it also shows people.
MAIN = set(
    "dog cat horse cow sheep bird bear elephant giraffe zebra airplane train bus truck motorcycle boat car "
    "bicycle".split()
)
# Things that appear in photos of anything, so a single label never rules them out.
COMMON = set(
    "person fence chair table lamp car boat ship building house barn tree rock wall rope cup plate bowl pot "
    "bottle ball bench bed sofa bag hat shoe cage sign street beach lakeshore cliff mountain valley sandbar dock "
    "pier window glass clock hay net bucket barrel box crate carton packet stone shop fountain greenhouse truck "
    "bicycle train bus basket chain collar pole nail bird camera tent canoe doormat quilt blanket pillow towel "
    "tub bathtub crib handkerchief".split()
)
TAME = {"dog", "cat", "horse", "bird", "fish", "cow", "sheep", "goat", "pig", "rabbit", "duck", "camel", "elephant"}
TAME |= {"insect", "fly", "bee", "spider", "ant", "butterfly", "parrot", "chicken", "hen", "cock", "buffalo", "person"}


def room_name(scene: str) -> str:
    """The everyday name of a dataset's scene; empty if it has none."""
    return ROOMS.get(scene, scene)


def may_be_taken_for(room: str, other: str) -> bool:
    """Whether a picture of one room may also pass for the other."""
    return room == other or any({room, other} <= set(rooms.split("|")) for rooms in LIKE_ROOMS)


def a_room(room: str) -> str:
    """The room's name with its article, as in an answer: "a kitchen"."""
    return f"the {room}" if room == "front of a house" else with_article(room)


def rules_out(names: Names, asked: Names) -> bool:
    """Whether a photo labeled with the thing ``names`` alone certainly does not show the thing ``asked``."""
    if not names.group or not asked.group or names.group == asked.group:
        return False
    if {asked.name, asked.basic} & {names.name, names.basic, *names.others}:
        return False
    if names.animal and asked.animal:
        return not {"insect", "bird"} >= {names.group, asked.group}  # birds eat insects
    if names.animal:
        return asked.group == "thing" and not _is_common(asked)
    return names.group in ("thing", "food") and asked.animal and not {asked.basic, asked.name} & TAME


def _is_common(names: Names) -> bool:
    words = {names.name, names.basic, names.name.split(" ")[-1], *names.others}
    return bool(words & COMMON)
