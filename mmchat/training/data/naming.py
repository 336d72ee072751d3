"""Everyday names for labeled things: "a cup", "some milk", "two dogs", and the kind that a thing belongs to.

Dataset labels are often not everyday English ("tvmonitor", "swine", "head cabbage"); RENAMED maps them to it.

Rosch et al. (1976) call the level at which people first name things the basic level: a dog rather than a bull mastiff
or an animal. We find it by walking up WordNet from a thing to the first name in BASIC_NAMES. Without WordNet's files,
a thing has only its label as a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ...errors import BadInput
from .wordnet import WordNet

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()

RENAMED = {
    "tvmonitor": "TV", "tv monitor": "TV", "tv": "TV", "tv or monitor": "TV", "cup or mug": "cup",
    "coat or jacket": "jacket", "salt or pepper shaker": "salt shaker", "pottedplant": "potted plant",
    "diningtable": "dining table", "aeroplane": "airplane", "motorbike": "motorcycle", "hair drier": "hair dryer",
    "swine": "pig", "cattle": "cow", "domestic cat": "cat", "koala bear": "koala", "ice bear": "polar bear",
    "head cabbage": "cabbage", "hotdog": "hot dog", "washer": "washing machine", "vacuum": "vacuum cleaner",
    "lumbermill": "sawmill", "beach wagon": "station wagon", "cab": "taxi", "jean": "jeans",
    "chainlink fence": "chain-link fence", "lakeside": "lakeshore", "sax": "saxophone", "thatch": "thatched roof",
    "dishrag": "dishcloth", "cellular telephone": "cell phone", "computer keyboard": "keyboard",
    "computer mouse": "mouse", "red beet": "beet", "yoghurt": "yogurt", "oatghurt": "oat yogurt",
    "soyghurt": "soy yogurt", "aubergine": "eggplant", "ski": "skis", "satsumas": "satsuma", "carrots": "carrot",
    "grey fox": "gray fox", "grey whale": "gray whale", "golfcart": "golf cart", "great grey owl": "great gray owl",
    "gasmask": "gas mask", "toyshop": "toy shop", "pay-phone": "pay phone", "electric fan": "fan",
    "caldron": "cauldron", "worm fence": "split-rail fence", "bell cote": "bell tower", "baby bed": "crib",
    "lesser panda": "red panda", "water ouzel": "dipper", "American chameleon": "anole", "bannister": "banister",
    "ballplayer": "baseball player", "cash machine": "ATM", "reflex camera": "camera", "Loafer": "loafer",
    "hog": "pig", "Madagascar cat": "ring-tailed lemur", "bathing cap": "swim cap", "brassiere": "bra",
    "Crock Pot": "slow cooker", "book jacket": "book cover", "Polaroid camera": "instant camera",
    "motor scooter": "scooter", "bottlecap": "bottle cap", "seashore": "beach", "sunglass": "sunglasses",
    "barracouta": "snoek", "photocopier": "copier", "analog clock": "clock", "thunder snake": "worm snake",
    "lycaenid": "blue butterfly", "web site": "website", "ashcan": "trash can", "ice lolly": "popsicle",
    "jinrikisha": "rickshaw", "bicycle-built-for-two": "tandem bicycle", "pajama": "pajamas",
    "pop bottle": "soda bottle", "hard disc": "hard disk", "saltshaker": "salt shaker", "Pekinese": "Pekingese",
    "EntleBucher": "Entlebucher", "Boston bull": "Boston terrier", "Scotch terrier": "Scottish terrier",
    "Leonberg": "Leonberger", "Airedale": "Airedale terrier", "Lhasa": "Lhasa apso", "red-backed sandpiper": "dunlin",
    "sulphur butterfly": "sulfur butterfly", "axe": "ax",
}  # fmt: skip
OTHER_NAMES = {
    "tv or monitor": ("monitor", "screen", "television"), "cup or mug": ("mug",), "coat or jacket": ("coat",),
    "salt or pepper shaker": ("pepper shaker", "shaker"), "sofa": ("couch",), "couch": ("sofa",), "tv": ("television",),
    "airplane": ("plane",), "motorcycle": ("motorbike",), "bicycle": ("bike",), "cow": ("cattle", "calf", "bull"),
    "cell phone": ("phone", "mobile phone"), "dining table": ("table",), "potted plant": ("plant",),
    "tv monitor": ("TV", "monitor", "screen", "television"), "pants": ("trousers",), "pepper": ("bell pepper",),
    "hen": ("chicken",), "rooster": ("chicken",), "laptop": ("computer",), "notebook computer": ("laptop",),
    "killer whale": ("whale",), "steam locomotive": ("train", "locomotive"), "ox": ("bull", "cow"),
    "electric locomotive": ("train", "locomotive"), "warplane": ("airplane", "plane", "jet"),
    "t-shirt": ("shirt", "tee"), "long-sleeved shirt": ("shirt", "long sleeve shirt", "sweater"),
}  # fmt: skip
# Ambiguous labels ("crane", "racer"): the synset selects the meaning.
RENAMED_SYNSETS = {
    "n03126707": "construction crane", "n02012849": "crane", "n03710721": "swimsuit", "n03710637": "swimsuit",
    "n02963159": "cardigan", "n02113186": "Cardigan corgi", "n02190166": "fly", "n01608432": "kite",
    "n02879718": "bow", "n03804744": "nail", "n10148035": "groom", "n04356056": "sunglasses",
    "n04355933": "sunglasses", "n03954731": "hand plane", "n04592741": "airplane wing", "n04037443": "race car",
    "n13133613": "ear of corn", "n12620546": "rose hip", "n02276258": "admiral butterfly",
    "n02892201": "memorial plaque", "n04019541": "hockey puck", "n02840245": "ring binder",
    "n02277742": "ringlet butterfly", "n02279972": "monarch butterfly", "n02389026": "horse",
    "n04515003": "upright piano", "n03673027": "ocean liner", "n09193705": "mountain", "n01847000": "duck",
    "n02412080": "sheep", "n01871265": "elephant", "n04399382": "teddy bear", "n04606251": "shipwreck",
    "n12768682": "horse chestnut", "n02817516": "bearskin hat", "n02536864": "coho salmon", "n02797295": "wheelbarrow",
    "n03337140": "filing cabinet", "n03947888": "pirate ship", "n03991062": "flowerpot",
    "n03832673": "notebook computer", "n02704792": "amphibious vehicle", "n04118776": "ruler",
    "n04243546": "slot machine", "n04367480": "mop", "n02814860": "lighthouse", "n03929660": "guitar pick",
    "n02231487": "stick insect", "n03854065": "pipe organ", "n01514668": "rooster", "n02096177": "cairn terrier",
    "n02088238": "basset hound", "n02090379": "redbone coonhound", "n02088632": "bluetick coonhound",
    "n02113023": "Pembroke corgi", "n02655020": "pufferfish", "n03483316": "hair dryer", "n03032252": "movie theater",
    "n02493509": "titi monkey", "n02112137": "chow chow", "n01817953": "African gray parrot",
    "n03089624": "candy store", "n03476684": "barrette",
}  # fmt: skip

MASS = set(
    "guacamole broccoli milk juice cream yogurt ginger garlic asparagus corn dough wool velvet espresso carbonara "
    "perfume coral seaweed lettuce rice bread spaghetti hay chainmail rapeseed spinach celery cheese butter honey "
    "sugar flour meat chicken beef pork water coffee tea wine beer grass sand snow fire cauliflower soup salad pasta "
    "jewelry furniture clothing luggage eggnog consomme".split()
) | set(
    "soy milk|oat milk|sour milk|sour cream|soy yogurt|oat yogurt|face powder|hair spray|ice cream|mashed potato|"
    "chain mail|bubble wrap|toilet paper|toilet tissue|chocolate sauce|red wine|hot chocolate".split("|")
)
PLURAL_ONLY = set(
    "shorts pants trousers jeans sunglasses glasses shoes scissors skis goggles binoculars pajamas tights leggings "
    "socks boots gloves stairs tongs pliers".split()
) | {"swimming trunks", "bathing trunks", "parallel bars"}

# Basic-level names, each with its WordNet sense unless that is the word's first one: "cow=cattle". The walk up WordNet
# stops at the first of them: an ox is "an ox", and a lion is not "a kind of big cat".
BASIC_NAMES = (
    "fish|shark|ray#7|eel#2|bird|owl|parrot|duck|goose|swan|penguin|rooster=cock#4|rooster=cock#5|hen|hen=hen#2|"
    "turkey|chicken#2|frog|salamander|turtle#2|tortoise|lizard|snake|crocodile|alligator#2|dinosaur|spider|"
    "scorpion#3|tick#2|crab|lobster#2|crayfish#3|shrimp#3|insect|beetle|ladybug|fly|mosquito|bee|wasp#2|ant|"
    "grasshopper|cricket|cockroach|dragonfly|butterfly|moth|worm|snail|slug#7|octopus#2|squid#2|jellyfish#2|coral#4|"
    "whale#2|killer whale|dolphin#2|seal#9|sea lion|dog|wild dog|wolf|coyote|fox|hyena|cat=domestic cat|"
    "wild cat=wildcat#3|big cat|lion|tiger#2|leopard#2|cheetah|jaguar|bear|raccoon#2|rabbit|hare|hamster|mouse|rat|"
    "squirrel|beaver#7|kangaroo|wallaby|koala|horse|donkey#2|zebra|pig=swine|cow=cattle|ox|buffalo=Old World buffalo|"
    "bison|sheep|goat|antelope|deer|giraffe|camel|llama|elephant|weasel#2|sloth#2|ape|gorilla|chimpanzee|orangutan|"
    "monkey|lemur|car|taxi=cab#3|jeep|ambulance|truck|fire engine|van#5|van=passenger van|bus|train|tank|ship|"
    "shipwreck=wreck#4|submarine|sailing ship=sailing vessel|sailboat|boat|canoe|airplane|bicycle|motorcycle|cart|"
    "sled|gun|cannon#2|cannon#4|bag|backpack|purse#3|hat|cap|helmet|helmet#2|shoe|sandal|boot|dress|robe|skirt#2|"
    "shirt|sweater|sweatshirt|coat|scarf|tie=necktie|swimsuit|glove#2|armor=body armor|bulletproof vest|mask|mask#4|"
    "towel|rug|curtain|chair|bench|table#2|desk|bed|crib|sofa|cabinet|box|chest#2|safe|basket|bottle|jug|mug#4|"
    "glass#2|bowl#3|pot|pan|oven|Dutch oven|knife|letter opener|spoon|pen|ax|saw#2|saw=saw#3|lock|lamp|lamp=lamp#2|"
    "candle|jack-o'-lantern#2|clock|watch|phone=telephone|cell phone=cellular telephone|computer|laptop|slide rule|"
    "website=web site|keyboard|camera|ball|punching bag#2|guitar|piano|drum|tent|door|fence|stone wall|bridge|shop|"
    "theater|fruit=edible fruit|apple|orange|lemon|banana#2|pineapple#2|strawberry|fig#4|vegetable|cabbage|"
    "broccoli#2|cauliflower#2|cucumber#2|potato|pepper#4|artichoke#2|carrot#3|onion#3|squash#2|mushroom#5|fungus|"
    "flower|bread|pretzel|hot dog#2|meat loaf|hamburger|sandwich|soup|stew#2|dessert|ice cream|wine|coffee"
)  # fmt: skip
# Nobody confuses things of different groups. A thing that belongs to several gets the first.
GROUPS = {
    "bird": "bird", "reptile": "reptile", "amphibian#3": "reptile", "crustacean": "sea", "arthropod": "insect",
    "fish": "sea", "aquatic mammal": "sea", "mollusk": "sea", "coelenterate": "sea", "echinoderm": "sea",
    "canine#2": "dog", "feline": "cat", "bear": "bear", "ungulate": "hoofed", "elephant": "elephant",
    "primate#2": "monkey", "rodent": "rodent", "lagomorph": "rodent", "musteline mammal": "rodent",
    "animal": "other animal", "person": "", "food": "food", "food#2": "food", "artifact": "thing",
    "fungus": "plant", "plant#2": "plant", "plant part": "plant",
}  # fmt: skip


@dataclass
class Names:
    """The names of a thing."""

    name: str  # "bull mastiff"
    basic: str = ""  # the basic-level name, "dog"; equal to ``name`` if unknown
    group: str = ""  # nobody confuses things of different groups; "" if unknown
    others: tuple[str, ...] = ()  # synonyms, and names of kinds below the basic level: "mastiff"

    @property
    def animal(self) -> bool:
        return self.group not in ("", "thing", "food", "plant")

    @property
    def says_basic(self) -> bool:
        """Whether the name ends with the basic name: "tiger shark", "goldfish"."""
        return self.name.lower().endswith(self.basic.lower())


class Dictionary:
    """Looks up the names of labels, in WordNet if available, and in the tables of this module."""

    def __init__(self, wordnet: WordNet | None = None):
        self.wordnet = wordnet
        self.basics = self._found(entry.partition("=")[::2] for entry in BASIC_NAMES.split("|"))
        self.groups = self._found((group, sense) for sense, group in GROUPS.items())

    @classmethod
    def read(cls, folder: str | Path | None) -> Dictionary:
        """A dictionary with the WordNet of a folder; None: without WordNet.

        Raises:
            BadInput: the folder does not hold WordNet 3.0's nouns.
        """
        return cls(WordNet(folder) if folder else None)

    def _found(self, entries: Iterable[tuple[str, str]]) -> dict[int, str]:
        """Synset → name, from pairs of a name and a sense such as "crane#5"; an empty sense is the name's first."""
        found = {}
        for name, sense in entries if self.wordnet else ():
            word, _, number = (sense or name).partition("#")
            senses = self.wordnet.senses(word)
            if len(senses) >= int(number or 1):
                found[senses[int(number or 1) - 1]] = name.partition("#")[0]
        return found

    def synset_of(self, label: str) -> str:
        """The synset of an unambiguous label with a basic-level name; otherwise empty."""
        senses = self.wordnet.senses(label) if self.wordnet else ()
        if len(senses) != 1 or not self.basics.keys() & set(self.wordnet.upwards(senses[0])):
            return ""
        return f"n{senses[0]:08d}"

    def names_of(self, label: str, synset: str = "") -> Names:
        """The names of a dataset's label and, if known, its synset.

        Raises:
            BadInput: WordNet has no such synset.
        """
        name = readable(label, synset)
        others = [*([] if " or " in label else [label]), *OTHER_NAMES.get(label, ()), *OTHER_NAMES.get(name, ())]
        basic = group = ""
        if self.wordnet and synset:
            basic, group, found = self._looked_up(synset)
            basic = "" if basic in others else basic  # "cup or mug": a cup is not a kind of mug
            others += found
        return Names(name, basic or name, group, tuple(dict.fromkeys(other for other in others if other != name)))

    def _looked_up(self, synset: str) -> tuple[str, str, list[str]]:
        """The basic-level name or "", the group, and the words for everything below the basic level."""
        if not re.fullmatch(r"n\d{8}", synset):
            raise BadInput(f"{synset!r} is not the number of a noun in WordNet, such as n02084071.")
        upwards = list(self.wordnet.upwards(int(synset[1:])))
        basic = next((offset for offset in upwards if offset in self.basics), upwards[0])
        below = [offset for offset in upwards[1:] if offset != basic and basic in self.wordnet.upwards(offset)]
        words = [*self.wordnet.synset(upwards[0]).words, *(self.wordnet.synset(offset).words[0] for offset in below)]
        group = next((group for offset, group in self.groups.items() if offset in upwards), "")
        if group == "other animal":  # each kind is its own group
            group += f" {self.basics.get(basic, words[0])}"
        return self.basics.get(basic, ""), group, [word for word in words if not self._is_latin(word)]

    def _is_latin(self, name: str) -> bool:
        """Whether a name is scientific: "Tinca tinca", of the "genus Tinca"."""
        return name[:1].isupper() and bool(self.wordnet.senses(f"genus {name.split()[0]}"))


def readable(label: str, synset: str = "") -> str:
    """The everyday name of a dataset's label."""
    return RENAMED_SYNSETS.get(synset) or RENAMED.get(label, label)


@cache
def inflector():
    """The engine of inflect: articles, plurals and singulars."""
    import inflect

    return inflect.engine()


def is_mass(name: str) -> bool:
    return name.lower() in MASS


def is_plural(name: str) -> bool:
    return name.lower() in PLURAL_ONLY


def with_article(name: str) -> str:
    """ "a cup", "an umbrella"; mass nouns and plurals without an article."""
    return name if is_mass(name) or is_plural(name) else inflector().a(name)


@cache
def plural(name: str) -> str:
    """ "cups"; mass nouns and plurals unchanged."""
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
    return special.get(word) or inflector().plural_noun(word) or f"{word}s"


def counted(name: str, count: int | None) -> str:
    """ "a dog", "two dogs"; "many dogs" for a crowd or more than twelve."""
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
    """An answer: capitalized, except names such as "iPod", and with a period."""
    first = phrase.split(" ")[0]
    return (phrase if re.match(r"[a-z]+[A-Z]", first) else phrase[:1].upper() + phrase[1:]).rstrip(".") + "."


def accepted(names: Names) -> list[str]:
    """Right answers to "What is this?" in lower case: name, synonyms and basic name, singular and plural."""
    words = dict.fromkeys([names.name, *names.others, names.basic])
    return list(dict.fromkeys(form.lower() for word in words if word for form in (word, plural(word))))
