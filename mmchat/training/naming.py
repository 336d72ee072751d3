"""What a labeled thing is called: "a cup", "some milk", "two dogs", and what it is a kind of.

Dataset labels are no everyday English ("tvmonitor", "swine", "head cabbage"); RENAMED says what people say instead.

Rosch et al. (1976) call the level at which people name things first the basic level: a dog rather than a bull mastiff
or an animal. WordNet 3.0 numbers an animal's kinds in one run behind it, so a short table of first and last numbers
finds the basic name of any of them; things that people made are numbered by their initial, so their kinds are listed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import BadInput

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()

RENAMED = {
    "tvmonitor": "TV", "tv monitor": "TV", "tv": "TV", "tv or monitor": "TV", "cup or mug": "cup",
    "coat or jacket": "jacket", "salt or pepper shaker": "salt shaker", "pottedplant": "potted plant",
    "diningtable": "dining table", "aeroplane": "airplane", "motorbike": "motorcycle", "hair drier": "hair dryer",
    "swine": "pig", "cattle": "cow", "domestic cat": "cat", "koala bear": "koala", "ice bear": "polar bear",
    "head cabbage": "cabbage", "hotdog": "hot dog", "washer": "washing machine", "vacuum": "vacuum cleaner",
    "lumbermill": "sawmill", "beach wagon": "station wagon", "cab": "taxi", "jean": "jeans", "teddy": "teddy bear",
    "chainlink fence": "chain-link fence", "upright": "upright piano", "liner": "ocean liner", "alp": "mountain",
    "lakeside": "lakeshore", "maillot": "swimsuit", "hip": "rose hip", "racer": "race car", "sax": "saxophone",
    "coho": "coho salmon", "brass": "memorial plaque", "thatch": "thatched roof", "dishrag": "dishcloth",
    "cellular telephone": "cell phone", "computer keyboard": "keyboard", "computer mouse": "mouse",
    "red beet": "beet", "yoghurt": "yogurt", "oatghurt": "oat yogurt", "soyghurt": "soy yogurt",
    "aubergine": "eggplant", "ski": "skis", "satsumas": "satsuma", "carrots": "carrot", "grey fox": "gray fox",
    "grey whale": "gray whale", "golfcart": "golf cart", "great grey owl": "great gray owl", "gasmask": "gas mask",
    "toyshop": "toy shop", "pay-phone": "pay phone", "electric fan": "fan", "caldron": "cauldron",
    "worm fence": "split-rail fence", "drake": "duck", "ram": "sheep", "bell cote": "bell tower", "baby bed": "crib",
    "lesser panda": "red panda", "plane": "hand plane", "sorrel": "horse", "bearskin": "bearskin hat",
    "water ouzel": "dipper", "American chameleon": "anole", "bannister": "banister", "ballplayer": "baseball player",
    "cash machine": "ATM", "monarch": "monarch butterfly", "admiral": "admiral butterfly", "wing": "airplane wing",
    "reflex camera": "camera", "Loafer": "loafer", "hog": "pig", "Madagascar cat": "ring-tailed lemur",
    "tusker": "elephant", "bathing cap": "swim cap", "brassiere": "bra", "puck": "hockey puck",
    "binder": "ring binder", "Crock Pot": "slow cooker", "ear": "ear of corn", "ringlet": "ringlet butterfly",
    "book jacket": "book cover", "Polaroid camera": "instant camera", "motor scooter": "scooter",
    "buckeye": "horse chestnut", "bottlecap": "bottle cap", "seashore": "beach", "sunglass": "sunglasses",
    "wreck": "shipwreck", "barracouta": "snoek", "photocopier": "copier", "analog clock": "clock",
    "thunder snake": "worm snake", "lycaenid": "blue butterfly", "web site": "website",
}  # fmt: skip
OTHER_NAMES = {
    "tv or monitor": ("monitor", "screen", "television"), "cup or mug": ("mug",), "coat or jacket": ("coat",),
    "salt or pepper shaker": ("pepper shaker", "shaker"), "sofa": ("couch",), "couch": ("sofa",), "tv": ("television",),
    "airplane": ("plane",), "motorcycle": ("motorbike",), "bicycle": ("bike",), "cow": ("cattle", "calf", "bull"),
    "cell phone": ("phone", "mobile phone"), "dining table": ("table",), "potted plant": ("plant",),
    "tv monitor": ("TV", "monitor", "screen", "television"), "pants": ("trousers",), "pepper": ("bell pepper",),
    "t-shirt": ("shirt", "tee"), "long-sleeved shirt": ("shirt", "long sleeve shirt", "sweater"),
}  # fmt: skip
# The label is one word for several things; the synset says which.
RENAMED_SYNSETS = {
    "n03126707": "construction crane", "n02012849": "crane", "n03710721": "swimsuit", "n03710637": "swimsuit",
    "n02963159": "cardigan", "n02113186": "Cardigan corgi", "n02190166": "fly", "n01608432": "kite",
    "n02879718": "bow", "n03804744": "nail", "n10148035": "groom", "n04356056": "sunglasses", "n04355933": "sunglasses",
}  # fmt: skip

MASS = set(
    "guacamole broccoli milk juice cream yogurt ginger garlic asparagus corn dough wool velvet espresso carbonara "
    "perfume coral seaweed lettuce rice bread spaghetti hay chainmail mail rapeseed thatch bubble wrap spinach celery "
    "cheese butter honey sugar flour meat chicken beef pork fish-meat water coffee tea wine beer grass sand snow fire "
    "cauliflower soup salad pasta jewelry furniture clothing luggage".split()
) | {"soy milk", "oat milk", "sour milk", "sour cream", "soy yogurt", "oat yogurt", "face powder", "hair spray"}
MASS |= {"ice cream", "mashed potato", "chain mail", "bubble wrap", "toilet paper", "toilet tissue", "chocolate sauce"}
MASS |= {"meat loaf", "red wine", "hot chocolate"} - {"meat loaf"}
MASS -= {"bubble", "wrap", "fish-meat", "mail", "thatch"}
PLURAL_ONLY = set(
    "shorts pants trousers jeans sunglasses glasses shoes scissors skis goggles binoculars pajamas tights leggings "
    "socks boots gloves stairs tongs pliers".split()
) | {"swimming trunks", "bathing trunks"}

# First and last WordNet number, the basic name, the group: what differs in group is not mistaken for each other.
RUNS = (
    (1439808, 1482072, "fish", "sea"), (1482330, 1494999, "shark", "sea"), (1495006, 1500000, "ray", "sea"),
    (1503061, 1621126, "bird", "bird"), (1621127, 1624600, "owl", "bird"), (1626700, 1629275, "amphibian", "reptile"),
    (1629276, 1636000, "salamander", "reptile"), (1639000, 1653000, "frog", "reptile"),
    (1661091, 1673900, "turtle", "reptile"), (1674464, 1696600, "lizard", "reptile"),
    (1696633, 1697900, "crocodile", "reptile"), (1698000, 1699900, "alligator", "reptile"),
    (1699831, 1725000, "dinosaur", "reptile"), (1726692, 1758000, "snake", "reptile"),
    (1770393, 1770394, "scorpion", "insect"), (1772222, 1776000, "spider", "insect"),
    (1776313, 1776400, "tick", "insect"), (1789000, 1817952, "bird", "bird"), (1817953, 1821500, "parrot", "bird"),
    (1821501, 1846330, "bird", "bird"), (1846331, 1855000, "duck", "bird"), (1855001, 1855500, "duck", "bird"),
    (1855501, 1858000, "bird", "bird"), (1858001, 1861500, "bird", "bird"), (1909906, 1911600, "jellyfish", "sea"),
    (1914609, 1914610, "sea anemone", "sea"), (1914700, 1921000, "coral", "sea"), (1922000, 1935000, "worm", "sea"),
    (1940736, 1969999, "mollusk", "sea"), (1976146, 1982649, "crab", "sea"), (1982650, 1985000, "lobster", "sea"),
    (1985100, 1985999, "crayfish", "sea"), (1986000, 1986300, "crab", "sea"), (2000954, 2062000, "bird", "bird"),
    (2062430, 2069000, "whale", "sea"), (2069001, 2072000, "whale", "sea"), (2076196, 2081000, "seal", "sea"),
    (2084071, 2114000, "dog", "dog"), (2114100, 2114899, "wolf", "dog"), (2114901, 2117000, "wild dog", "dog"),
    (2117135, 2118300, "hyena", "dog"), (2118333, 2121000, "fox", "dog"), (2121620, 2124500, "cat", "cat"),
    (2124623, 2131500, "big cat", "cat"), (2131653, 2135000, "bear", "bear"), (2159955, 2164400, "insect", "insect"),
    (2164464, 2188600, "beetle", "insect"), (2188699, 2205800, "fly", "insect"), (2206270, 2218000, "bee", "insect"),
    (2219000, 2225000, "ant", "insect"), (2226429, 2228400, "grasshopper", "insect"),
    (2228500, 2268147, "insect", "insect"), (2268148, 2268700, "dragonfly", "insect"),
    (2268701, 2274000, "insect", "insect"), (2274024, 2284000, "butterfly", "insect"),
    (2316700, 2317900, "starfish", "sea"), (2324000, 2328900, "rabbit", "rodent"),
    (2329401, 2342885, "rodent", "rodent"), (2355227, 2358000, "squirrel", "rodent"),
    (2374149, 2390000, "horse", "hoofed"), (2391049, 2391999, "zebra", "hoofed"), (2395003, 2398000, "pig", "hoofed"),
    (2402010, 2408428, "cow", "hoofed"), (2408429, 2410400, "buffalo", "hoofed"),
    (2411705, 2415999, "sheep", "hoofed"), (2416104, 2418500, "goat", "hoofed"),
    (2419796, 2426000, "antelope", "hoofed"), (2437136, 2437500, "camel", "hoofed"),
    (2441942, 2444500, "weasel", "rodent"), (2470325, 2470330, "primate", "monkey"),
    (2480153, 2483800, "ape", "monkey"), (2484322, 2496000, "monkey", "monkey"),
    (2496913, 2500600, "lemur", "monkey"), (2503517, 2505000, "elephant", "elephant"),
    (2512053, 2660000, "fish", "sea"), (7705931, 7706999, "fruit", "food"), (7739125, 7772000, "fruit", "food"),
    (7707451, 7734743, "vegetable", "food"), (12985857, 13060000, "mushroom", "plant"),
)  # fmt: skip
ANIMALS = (1300000, 2680000)
LISTED = {
    "car": "station wagon|taxi|convertible|jeep|limousine|minivan|Model T|race car|sports car",
    "truck": "fire engine|garbage truck|pickup|tow truck|trailer truck",
    "bus": "minibus|school bus|trolleybus", "van": "police van|moving van|minivan",
    "ship": "aircraft carrier|container ship|ocean liner|pirate ship", "bicycle": "mountain bike|bicycle-built-for-two",
    "boat": "schooner|speedboat|canoe|gondola|lifeboat|fireboat|catamaran|trimaran|yawl",
    "airplane": "airliner|warplane", "train": "bullet train|steam locomotive|electric locomotive",
    "bag": "backpack|purse|mailbag|plastic bag", "hat": "bonnet|cowboy hat|sombrero|hat with a wide brim|bearskin hat",
    "shoe": "loafer|running shoe|clog|sandal", "chair": "folding chair|rocking chair|throne|barber chair",
    "clock": "digital clock|wall clock", "telephone": "pay phone|dial telephone|cell phone", "pot": "slow cooker",
    "computer": "laptop|notebook|desktop computer|hand-held computer",
    "guitar": "acoustic guitar|electric guitar", "helmet": "crash helmet|football helmet|pickelhaube",
    "piano": "grand piano|upright piano", "tent": "mountain tent", "camera": "instant camera", "watch": "digital watch",
    "musical instrument": "accordion|banjo|cello|violin|harp|flute|oboe|bassoon|trombone|french horn|French horn|"
    "harmonica|maraca|chime|trumpet|saxophone|cornet|organ|marimba|panpipe|ocarina",
    "bed": "crib|four-poster|studio couch", "dog": "Cardigan corgi",
}  # fmt: skip
BASIC_BY_NAME = {name: basic for basic, names in LISTED.items() for name in names.split("|")}
# Above the basic level: right as an answer, but not worth saying of a violin or an orange, and never asked for.
TOO_COARSE = {"musical instrument", "mollusk", "amphibian", "rodent", "fruit", "vegetable", "primate", "insect"}


# Basic names themselves, whatever else they are a kind of.
EVERYDAY = set(
    "lion tiger leopard cheetah jaguar goose hen snail slug hamster cricket cockroach gorilla chimpanzee backpack "
    "purse taxi jeep laptop canoe flamingo ladybug hare crib sandal ox pelican sombrero".split()
) | {"cell phone", "fire engine"}


@dataclass
class Names:
    """What a thing is called and what it is a kind of."""

    name: str  # "bull mastiff"
    basic: str = ""  # "dog"; the name itself where nothing is known
    group: str = ""  # things of two groups are not mistaken for each other; "" where nothing is known
    others: tuple[str, ...] = ()  # further words for it

    @property
    def animal(self) -> bool:
        return self.group not in ("", "thing", "food", "plant")

    @property
    def says_basic(self) -> bool:
        """Whether the name itself tells the basic name: "tiger shark", "goldfish"."""
        return self.name.lower().endswith(self.basic.lower())


@dataclass
class Dictionary:
    """Further names, from a JSON list of ``{"synset", "names"}``; without one, the names in this module only."""

    names: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path | None) -> Dictionary:
        """Raises BadInput: it is no such list."""
        if path is None:
            return cls()
        try:
            content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls({entry["synset"]: list(entry["names"]) for entry in content})
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise BadInput(f'{path} is no JSON list of {{"synset", "names"}} ({error!r}).') from error

    def names_of(self, label: str, synset: str = "") -> Names:
        """Of a dataset's label and, if it has one, its WordNet number."""
        name = readable(label, synset)
        others = [other for other in self.names.get(synset, ()) if not _is_latin(other)]
        others += [*([] if " or " in label else [label]), *OTHER_NAMES.get(label, ())]
        basic, group = _basic(name, synset)
        return Names(name, basic, group, tuple(dict.fromkeys(other for other in others if other != name)))


def readable(label: str, synset: str = "") -> str:
    """What people say for a dataset's label."""
    return RENAMED_SYNSETS.get(synset) or RENAMED.get(label, label)


def _is_latin(name: str) -> bool:
    """Whether it is a species's scientific name: "Tinca tinca"."""
    return bool(re.fullmatch(r"[A-Z][a-z]+ [a-z]+(us|a|is|um|ii|i|es|os|ax|ens|or|on|ris|as|ops|e|yx|ans|x)", name))


def _basic(name: str, synset: str) -> tuple[str, str]:
    number = int(synset[1:]) if re.fullmatch(r"n\d{8}", synset) else None
    if name in BASIC_BY_NAME:
        return BASIC_BY_NAME[name], "dog" if BASIC_BY_NAME[name] == "dog" else "thing"
    if number is None:
        return name, ""
    for first, last, basic, group in RUNS:
        if first <= number <= last:
            return basic, group
    if ANIMALS[0] <= number <= ANIMALS[1]:
        return name, f"other animal {name}"
    return name, "thing" if 2680000 < number < 4700000 else "food" if 7500000 < number < 8000000 else ""


@cache
def _inflect():
    import inflect

    return inflect.engine()


def is_mass(name: str) -> bool:
    return name.lower() in MASS


def is_plural(name: str) -> bool:
    return name.lower() in PLURAL_ONLY


def with_article(name: str) -> str:
    """ "a cup", "an umbrella"; "milk" and "shorts" without one."""
    return name if is_mass(name) or is_plural(name) else _inflect().a(name)


@cache
def plural(name: str) -> str:
    """ "cups"; "milk" and "shorts" stay as they are."""
    if is_mass(name) or is_plural(name):
        return name
    head, *rest = re.split(r"( with | of | for )", name, maxsplit=1)  # "hats with a wide brim"
    parts = [re.sub(r"\S+$", lambda last: _plural_word(last[0]), part) for part in head.split(" or ")]
    return " or ".join(parts) + "".join(rest)


def _plural_word(word: str) -> str:
    special = {
        "TV": "TVs",
        "iPod": "iPods",
        "ATM": "ATMs",
        "mouse": "mice",
        "fish": "fish",
        "bison": "bison",
        "cattle": "cattle",
    }
    return special.get(word) or _inflect().plural_noun(word) or f"{word}s"


def counted(name: str, count: int | None) -> str:
    """ "a dog", "two dogs", "13 dogs"; "many dogs" of a crowd."""
    if is_mass(name) or count == 1:
        return with_article(name)
    if is_plural(name):
        return name
    number = "many" if count is None else NUMBERS[count] if count < len(NUMBERS) else "many"
    return f"{number} {plural(name)}"


def listed(phrases: Sequence[str]) -> str:
    """ "a person, two dogs and a ball"."""
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def sentence(phrase: str) -> str:
    """An answer: a capital first ("iPod" keeps its own), a full stop last."""
    first = phrase.split(" ")[0]
    return (phrase if re.match(r"[a-z]+[A-Z]", first) else phrase[:1].upper() + phrase[1:]).rstrip(".") + "."


def accepted(names: Names) -> list[str]:
    """Right answers to "What is this?", lower case: the name, other words for it, the basic name; one and several."""
    words = dict.fromkeys([names.name, *names.others, names.basic])
    return list(dict.fromkeys(form.lower() for word in words if word for form in (word, plural(word))))
