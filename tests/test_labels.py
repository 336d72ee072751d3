"""Labeled pictures and detailed descriptions → conversations."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from PIL import Image

from mmchat.errors import BadInput
from mmchat.training.data import captions, naming
from mmchat.training.data.detailed_descriptions import choose, contradict
from mmchat.training.data.label_facts import may_be_taken_for
from mmchat.training.data.label_questions import conversations, questions_only
from mmchat.training.data.label_rules import Asker
from mmchat.training.data.label_wordings import EVALUATION_WORDINGS, WORDINGS, tidy_question
from mmchat.training.data.labels import Box, Labeled, read_labels
from mmchat.training.data.naming import Dictionary, counted, plural, sentence, with_article

ROOT = Path(__file__).parent.parent


def collection(count: int = 120, seed: int = 4, numbers: dict[str, str] | None = None) -> list[Labeled]:
    """Pictures of pets with balls, of wild animals and instruments, and of rooms."""
    rng = random.Random(seed)
    pictures = []
    for number in range(count):
        things = rng.sample(["dog", "cat", "ball", "person", "sofa"], rng.randint(1, 3))
        things += ["ball"] if "dog" in things and "ball" not in things else []
        pictures.append(
            Labeled(f"pets/{number}.jpg", "pets", {thing: rng.choice((1, 1, 1, 2, 3, 4, 5)) for thing in things})
        )
    single = ["hammerhead", "bull mastiff", "harp", "bee"]
    numbers = numbers or {}
    pictures += [
        Labeled(f"one/{n}.jpg", "one", label=label, synset=numbers.get(label.replace(" ", "_"), ""))
        for n, label in enumerate(single * 5)
    ]
    rooms = ["kitchen", "bedroom", "bathroom", "childs room"]
    return pictures + [Labeled(f"rooms/{n}.jpg", "rooms", scene=scene) for n, scene in enumerate(rooms * 5)]


@pytest.mark.parametrize(
    ("name", "one", "several"),
    [
        ("cup", "a cup", "two cups"),
        ("umbrella", "an umbrella", "two umbrellas"),
        ("unicycle", "a unicycle", "two unicycles"),
        ("hourglass", "an hourglass", "two hourglasses"),
        ("milk", "milk", "milk"),
        ("broccoli", "broccoli", "broccoli"),
        ("shorts", "shorts", "shorts"),
        ("sunglasses", "sunglasses", "sunglasses"),
        ("sheep", "a sheep", "two sheep"),
        ("mouse", "a mouse", "two mice"),
        ("knife", "a knife", "two knives"),
        ("hat with a wide brim", "a hat with a wide brim", "two hats with a wide brim"),
    ],
)
def test_articles_and_plurals(name, one, several):
    assert with_article(name) == one and counted(name, 2) == several


def test_sentences_keep_lower_case_names():
    assert sentence("iPod") == "iPod." and sentence("a dog") == "A dog." and plural("TV") == "TVs"


def write_wordnet(folder: Path, synsets: dict[str, tuple[str, ...]], version: str = "3.0") -> dict[str, str]:
    """Writes WordNet's files. ``synsets`` maps words, with "_" for spaces, to the first words of the hypernyms.

    Returns:
        First word -> synset number, such as "n00000123".
    """
    head = f"  1 WordNet {version} Copyright 2006 by Princeton University.  All rights reserved.  \n"
    lines, offsets = [], {}
    for _ in range(2):  # a line is as long with the right numbers as without, so the second time they are right
        lines, position, place = [], len(head), dict(offsets)
        for words, hypernyms in ((key.split(), above) for key, above in synsets.items()):
            named = " ".join(f"{word} 0" for word in words)
            pointers = " ".join(f"@ {place.get(above, 0):08d} n 0000" for above in hypernyms)
            offsets[words[0]] = position
            fields = f"{position:08d} 05 n {len(words):02x} {named} {len(hypernyms):03d} {pointers}".rstrip()
            lines.append(f'{fields} | what it is; "as said"  \n')
            position += len(lines[-1])
    senses: dict[str, list[int]] = defaultdict(list)
    for key in synsets:
        for word in key.split():
            senses[word.lower()].append(offsets[key.split()[0]])
    index = [
        f"{word} n {len(found)} 1 @ {len(found)} 0 {' '.join(f'{place:08d}' for place in found)}  \n"
        for word, found in sorted(senses.items())
    ]
    (folder / "data.noun").write_text(head + "".join(lines))
    (folder / "index.noun").write_text(head + "".join(index))
    return {word: f"n{offset:08d}" for word, offset in offsets.items()}


SYNSETS = {
    "animal": (),
    "artifact": (),
    "food": (),
    "canine_tooth canine": (),
    "canine canid": ("animal",),
    "domestic_animal": ("animal",),
    "dog domestic_dog Canis_familiaris": ("canine", "domestic_animal"),
    "mastiff big_dog": ("dog",),
    "bull_mastiff": ("mastiff",),
    "bird": ("animal",),
    "goose": ("bird",),
    "fish": ("animal",),
    "shark": ("fish",),
    "hammerhead hammerhead_shark": ("shark",),
    "tiger_shark": ("shark",),
    "genus_Tinca": (),
    "tench doctor_fish Tinca_tinca": ("fish",),
    "insect": ("animal",),
    "bee": ("insect",),
    "edible_fruit": ("food",),
    "orange": ("edible_fruit",),
    "jackfruit": ("edible_fruit",),
    "pomegranate": ("edible_fruit",),
    "musical_instrument": ("artifact",),
    "violin fiddle": ("musical_instrument",),
    "harp": ("musical_instrument",),
    "vessel": ("artifact",),
    "mug": ("vessel",),
    "boxer": ("dog",),
    "boxer pugilist": ("animal",),
    "swine": ("animal",),
}


@pytest.fixture(scope="module")
def tiny_wordnet(tmp_path_factory) -> tuple[Dictionary, dict[str, str]]:
    folder = tmp_path_factory.mktemp("wordnet")
    numbers = write_wordnet(folder, SYNSETS)
    return Dictionary.read(folder), numbers


@pytest.mark.parametrize(
    ("label", "answer", "right", "wrong"),
    [
        ("bull mastiff", "A bull mastiff, a kind of dog.", {"mastiff", "dog", "dogs"}, {"big dog", "canine", "animal"}),
        ("hammerhead", "A hammerhead, a kind of shark.", {"hammerhead shark", "shark"}, {"fish"}),
        ("tiger shark", "A tiger shark.", {"tiger shark", "shark"}, {"fish"}),
        ("tench", "A tench, a kind of fish.", {"doctor fish", "fish"}, {"tinca tinca", "animal"}),
        ("goose", "A goose.", {"goose", "geese"}, {"bird", "duck"}),
        ("orange", "An orange.", {"orange", "oranges"}, {"fruit", "food"}),
        ("pomegranate", "A pomegranate, a kind of fruit.", {"pomegranate", "fruit"}, {"food"}),
        ("jackfruit", "A jackfruit.", {"jackfruit", "fruit"}, {"food"}),
        ("violin", "A violin.", {"violin", "violins", "fiddle"}, {"musical instrument", "instrument", "artifact"}),
        ("swine", "A pig.", {"pig", "swine"}, {"animal"}),
    ],
)
def test_names_on_and_below_the_basic_level(tiny_wordnet, label, answer, right, wrong):
    dictionary, numbers = tiny_wordnet
    picture = Labeled("1.jpg", label=label, synset=numbers[label.replace(" ", "_")])
    (entry,) = questions_only([picture], random.Random(0), dictionary=dictionary)
    assert entry["conversations"][1]["value"] == answer and entry["kind"] == "name"
    assert right <= set(entry["accepted"]) and not wrong & set(entry["accepted"])


def test_merged_labels_are_not_kinds_of_each_other(tiny_wordnet):
    dictionary, numbers = tiny_wordnet
    names = dictionary.names_of("cup or mug", numbers["mug"])
    assert names.basic == names.name == "cup" and "mug" in naming.accepted(names)


@pytest.mark.parametrize(
    ("label", "answer"),
    [("bull mastiff", "A bull mastiff, a kind of dog."), ("boxer", "A boxer."), ("harp", "A harp."), ("mop", "A mop.")],
)
def test_unambiguous_labels_without_a_synset_are_looked_up(tiny_wordnet, label, answer):
    (entry,) = questions_only([Labeled("1.jpg", label=label)], random.Random(0), dictionary=tiny_wordnet[0])
    assert entry["conversations"][1]["value"] == answer


@pytest.mark.parametrize(
    ("label", "synset", "answer"),
    [
        ("bull mastiff", "n02108422", "A bull mastiff."),
        ("cup or mug", "", "A cup."),
        ("swine", "", "A pig."),
        ("guacamole", "n07583066", "Guacamole."),
        ("plane", "", "A plane."),  # ImageNet's is a tool, and its number says so
        ("plane", "n03954731", "A hand plane."),
    ],
)
def test_without_wordnet_the_label_is_the_name(label, synset, answer):
    (entry,) = questions_only([Labeled("1.jpg", label=label, synset=synset)], random.Random(0))
    assert entry["conversations"][1]["value"] == answer


def test_folders_without_wordnet_are_errors(tmp_path):
    with pytest.raises(BadInput, match=r"does not hold WordNet: data\.noun cannot be read"):
        Dictionary.read(tmp_path)
    write_wordnet(tmp_path, {"dog": ()}, version="3.1")
    with pytest.raises(BadInput, match=r"data\.noun in .* is not from WordNet 3\.0"):
        Dictionary.read(tmp_path)
    (tmp_path / "index.noun").write_text("dog\n")
    with pytest.raises(BadInput, match=r"index\.noun in .* is not WordNet's index of nouns"):
        Dictionary.read(tmp_path)


@pytest.mark.parametrize("synset", ["n00000005", "n99999999", "02084071", "dog"])
def test_wrong_synset_numbers_are_errors(tiny_wordnet, synset):
    with pytest.raises(BadInput, match=synset):
        tiny_wordnet[0].names_of("dog", synset)


def prepare(arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    from tests.in_process import run_script

    return run_script(f"training_scripts/prepare_data.py labels --out out.json {arguments}", folder)


def test_prepare_data_rejects_a_folder_without_wordnet(tmp_path):
    (tmp_path / "labels.json").write_text('[{"image": "1.jpg", "label": "bull mastiff"}]')
    command = "--labels labels.json --make questions --wordnet ."
    bad = prepare(command, tmp_path)
    assert bad.returncode == 1 and "does not hold WordNet" in bad.stderr and bad.stderr.count("\n") == 1
    write_wordnet(tmp_path, SYNSETS)
    assert prepare(command, tmp_path).returncode == 0 and "a kind of dog" in (tmp_path / "out.json").read_text()


@pytest.fixture(scope="module")
def wordnet() -> Dictionary:
    import nltk

    folders = [Path("/usr/share/wordnet"), *(Path(folder) / "corpora" / "wordnet" for folder in nltk.data.path)]
    folder = next((folder for folder in folders if (folder / "data.noun").exists()), None)
    if folder is None:
        pytest.skip("WordNet is not installed (Debian's wordnet-base, or nltk's corpus wordnet)")
    return Dictionary.read(folder)


def test_every_name_in_our_tables_is_in_wordnet(wordnet):
    known = set(wordnet.basics.values()), set(wordnet.groups.values())
    assert known[0] == {entry.partition("=")[0].partition("#")[0] for entry in naming.BASIC_NAMES.split("|")}
    assert known[1] == set(naming.GROUPS.values())
    assert len(wordnet.basics) == len(naming.BASIC_NAMES.split("|"))
    for synset in naming.RENAMED_SYNSETS:
        assert wordnet.names_of("", synset).name


@pytest.mark.parametrize(
    ("label", "synset", "answer", "group"),
    [
        ("bull mastiff", "n02108422", "A bull mastiff, a kind of dog.", "dog"),
        ("Italian greyhound", "n02091032", "An Italian greyhound, a kind of dog.", "dog"),
        ("goose", "n01855672", "A goose.", "bird"),
        ("quail", "n01806567", "A quail, a kind of bird.", "bird"),
        ("crane", "n02012849", "A crane, a kind of bird.", "bird"),
        ("crane", "n03126707", "A construction crane.", "thing"),
        ("American lobster", "n01983481", "An American lobster.", "sea"),
        ("hermit crab", "n01986214", "A hermit crab.", "sea"),
        ("cougar", "n02125311", "A cougar, a kind of wild cat.", "cat"),
        ("lion", "n02129165", "A lion.", "cat"),
        ("hotdog", "n07697537", "A hot dog.", "food"),
        ("meat loaf", "n07871810", "A meat loaf.", "food"),
        ("bathing cap", "n02807133", "A swim cap.", "thing"),
        ("ambulance", "n02701002", "An ambulance.", "thing"),
        ("minivan", "n03770679", "A minivan.", "thing"),
        ("violin", "n04536866", "A violin.", "thing"),
        ("orange", "n07747607", "An orange.", "food"),
        ("bolete", "n13054560", "A bolete, a kind of fungus.", "plant"),
        ("cup or mug", "n03797390", "A cup.", "thing"),
    ],
)
def test_names_in_the_real_wordnet(wordnet, label, synset, answer, group):
    (entry,) = questions_only([Labeled("1.jpg", label=label, synset=synset)], random.Random(0), dictionary=wordnet)
    assert entry["conversations"][1]["value"] == answer and wordnet.names_of(label, synset).group == group


def asked(pictures, seed=0, evaluation=False, dictionary=None):
    return Asker(pictures, random.Random(seed), dictionary, evaluation=evaluation).ask()


def name_in(question: str) -> str:
    return next(
        word
        for word in ("dog", "cat", "ball", "person", "people", "sofa", "mastiff", "hammerhead", "shark", "harp", "bee")
        if re.search(rf"\b{word}", question.lower().replace("catch", ""))
    )


@pytest.mark.parametrize("evaluation", [False, True])
def test_presence_is_balanced_per_name_and_never_denies_a_label(tiny_wordnet, evaluation):
    dictionary, numbers = tiny_wordnet
    pictures = collection(numbers=numbers)
    answers: dict[str, Counter] = defaultdict(Counter)
    found = asked(pictures, evaluation=evaluation, dictionary=dictionary)
    for picture, questions in zip(pictures, found, strict=True):
        for question in questions:
            if question.kind.startswith("presence"):
                name = {"people": "person"}.get(name_in(question.text), name_in(question.text))
                answers[name][question.answer] += 1
                there = {*(picture.objects or {}), picture.label, *picture.label.split()}
                there |= {"dog"} if "mastiff" in there else {"shark"} if "hammerhead" in there else set()
                assert (name in there) == (question.answer == "Yes."), (picture, question)
    assert {"dog", "sofa", "shark", "harp"} <= answers.keys()
    assert all(counts["Yes."] == counts["No."] for counts in answers.values())


def test_adversarial_questions_ask_for_things_that_occur_together():
    """Forks lie next to plates, so a picture with a plate and no fork is asked for a fork first."""
    pictures = [Labeled(f"{n}.jpg", "g", {"plate": 1, "fork": 1}) for n in range(10)]
    pictures += [Labeled(f"plate{n}.jpg", "g", {"plate": 1}) for n in range(6)]
    pictures += [Labeled(f"dog{n}.jpg", "g", {"dog": 1}) for n in range(60)]
    found = [
        picture.image
        for picture, questions in zip(pictures, asked(pictures), strict=True)
        for question in questions
        if question.kind == "presence adversarial" and question.answer == "No." and "fork" in question.text
    ]
    assert len(found) == 5 and all(image.startswith("plate") for image in found)


def test_mass_nouns_and_plurals_get_fitting_wordings():
    pictures = [Labeled(f"{n}.jpg", "g", {"milk": 1} if n % 2 else {"shorts": 1}) for n in range(200)]
    texts = [question.text for questions in asked(pictures) for question in questions if "presence" in question.kind]
    assert len(texts) > 100
    for text in texts:
        assert not re.search(r"\b(a|an) (milk|shorts)\b|milks|[Ii]s (there )?any shorts", text), text


@pytest.mark.parametrize("evaluation", [False, True])
def test_counts_are_balanced(evaluation):
    answers = Counter(
        question.answer
        for questions in asked(collection(), evaluation=evaluation)
        for question in questions
        if question.kind == "how many"
    )
    assert set(answers) == {"One.", "Two.", "Three.", "Four.", "Five."} and len(set(answers.values())) == 1


def test_evaluation_questions_are_unique_and_use_no_training_wording():
    for kind, wordings in EVALUATION_WORDINGS.items():
        assert not {text.lower() for text in wordings} & {text.lower() for text in WORDINGS[kind]}
    entries = list(questions_only(collection(), random.Random(0)))
    counts = [(e["image"], e["conversations"][0]["value"]) for e in entries if e["kind"] == "how many"]
    assert len(counts) == len(set(counts))


def test_rooms_have_everyday_names_and_similar_ones_are_not_denied():
    texts = {q.answer for questions in asked(collection()) for q in questions if q.kind == "room"}
    assert texts == {"A kitchen.", "A bedroom.", "A bathroom.", "A child's room."}
    assert may_be_taken_for("bedroom", "hotel room") and not may_be_taken_for("kitchen", "bathroom")
    assert not asked([Labeled("1.jpg", scene="bow window indoor")])[0]


@pytest.mark.slow
def test_questions_depend_only_on_the_seed():
    def made(hash_seed: str) -> bytes:
        code = (
            "import random, json, sys; sys.path.insert(0, '.'); from tests.test_labels import collection;"
            "from mmchat.training.data.label_questions import conversations;"
            "print(json.dumps(list(conversations(collection(30), random.Random(3), per_image=4))))"
        )
        environment = {"PYTHONHASHSEED": hash_seed, "PATH": ""}
        return subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True
        ).stdout

    assert made("1") == made("2")
    few = list(conversations(collection(), random.Random(3), per_image=4))
    for image, count in Counter(entry["image"] for entry in few).items():
        yes_no = sum(e["conversations"][1]["value"] in ("Yes.", "No.") for e in few if e["image"] == image)
        assert count <= 4 and yes_no <= 2


def test_kinds_of_questions_can_be_chosen():
    entries = list(conversations(collection(), random.Random(3), kinds=["how many"]))
    assert entries and {entry["conversations"][1]["value"] for entry in entries} == {
        "One.", "Two.", "Three.", "Four.", "Five."
    }  # fmt: skip
    entries = list(questions_only(collection(), random.Random(3), kinds=["name", "room"]))
    assert {entry["kind"] for entry in entries} == {"name", "room"}


def test_yes_and_no_stay_balanced_in_small_samples():
    found = Counter()
    for entry in conversations(collection(), random.Random(3), per_image=3):
        question, answer = (turn["value"] for turn in entry["conversations"])
        found[answer] += answer in ("Yes.", "No.")
    assert found["Yes."] == found["No."] > 20


def test_typing_errors_are_corrected_and_list_answers_become_sentences():
    assert (
        tidy_question("waht is infront of the the chair in the image12 ?")
        == "What is in front of the chair in the picture?"
    )
    picture = Labeled("1.jpg", questions=(("what is on the table?", "lamp, toy, paper"), ("how many chairs?", "4")))
    assert [q.answer for q in asked([picture])[0]] == ["Lamp, toy and paper.", "Four."]
    (only,) = asked([picture], evaluation=True)[0]
    assert only.accepted == ("4", "four") and only.kind == "daquar"


def test_boxes_answer_left_right_and_biggest():
    boxes = (Box("dog", 0, 0, 20, 20), Box("cat", 60, 0, 99, 90))
    pictures = [Labeled("1.jpg", objects={"dog": 1, "cat": 1}, boxes=boxes)]
    for seed in range(20):
        for question in asked(pictures, seed)[0]:
            if question.kind == "biggest":
                assert question.answer == "A cat."
            if question.kind == "side":
                assert question.answer == ("A dog." if "left" in question.text else "A cat.")
            if question.kind == "is side":
                dog_asked = "the dog to the" in question.text
                assert (question.answer == "Yes.") == (
                    dog_asked == ("left of" in question.text or "the left" in question.text)
                )


def test_class_folders(tmp_path):
    for name in ("polar_bear/1.jpg", "cup/2.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "cup" / "notes.txt").write_text("no picture")
    assert [(p.image, p.label) for p in read_labels(tmp_path)] == [
        ("cup/2.png", "cup"),
        ("polar_bear/1.jpg", "polar bear"),
    ]


def test_coco_and_voc_give_boxes_and_counts(tmp_path):
    coco = {
        "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 8, "file_name": "8.jpg"}],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "person"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4]},
            {"image_id": 7, "category_id": 1, "bbox": [5, 5, 3, 4]},
            {"image_id": 7, "category_id": 2, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    dogs, nothing = read_labels(tmp_path / "coco.json")
    assert dogs.objects == {"dog": 2, "person": None} and nothing.objects == {} and dogs.boxes[0].right == 4
    (tmp_path / "voc").mkdir()
    thing = "<object><name>cat</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>5</xmax><ymax>6</ymax></bndbox></object>"
    (tmp_path / "voc" / "1.xml").write_text(f"<annotation><filename>1.jpg</filename>{thing}</annotation>")
    (cat,) = read_labels(tmp_path / "voc")
    assert cat.image == "1.jpg" and cat.objects == {"cat": 1} and cat.boxes == (Box("cat", 1, 2, 5, 6),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"odd\.json, line 1"),
        ("[1, 2]", r"odd\.json"),
        ('[{"image": "a.jpg", "label": "cup"}, {"image": "b.jpg"}]', r"odd\.json, entry 2"),
        ('[{"image": "a.jpg", "objects": {"cup": 0}}]', r"odd\.json, entry 1.*whole number"),
        ('[{"image": "a.jpg", "question": "What?"}]', r"odd\.json, entry 1.*answer"),
        ('{"annotations": [{"image_id": 1}], "images": [], "categories": []}', r"odd\.json, entry 1"),
        ('{"annotations": []}', r"odd\.json"),
    ],
)
def test_errors_name_the_file_and_the_entry(tmp_path, content, message):
    (tmp_path / "odd.json").write_text(content)
    with pytest.raises(BadInput, match=message):
        read_labels(tmp_path / "odd.json")


def test_bad_folders_are_errors(tmp_path):
    (tmp_path / "1.xml").write_text("<annotation>\n<filename>")
    with pytest.raises(BadInput, match=r"1\.xml, line 2"):
        read_labels(tmp_path)
    with pytest.raises(BadInput, match="does not exist"):
        read_labels(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no labeled pictures"):
        read_labels(tmp_path / "empty")


def test_details_are_consistent_and_repeat_little():
    written = [
        "A man in a red jacket stands beside a wooden bench",
        "A man in a blue jacket near a fountain and trees",  # another color
        "Two men walk past a store with a sign",  # another count
        "The man holds a camera and an umbrella",
        "A man leans on a bicycle next to a brick wall",
    ]
    chosen = choose(written)
    assert len(chosen) >= 3 and not any(contradict(a, b) for a in chosen for b in chosen if a != b)
    assert choose(["A dog runs on the grass", "The dog is running on grass", "A dog on the grass runs"])[1:] == []


def test_sentences_by_one_person_become_a_detail_and_never_a_caption():
    told = ["there are 2 wood chairs", "the walls are yellow and bare .", "A lamp hangs over the table in the middle"]
    picture = {"image": "1.jpg", "captions": [". ".join(told)], "sentences": [told]}
    (entry,) = captions.conversations([picture], random.Random(0), details=True)
    assert entry["conversations"][1]["value"] == (
        "There are two wood chairs. The walls are yellow and bare. A lamp hangs over the table in the middle."
    )
    assert not list(captions.descriptions([picture]))
    (item,) = captions.details_only([picture])
    assert item["kind"] == "detail" and item["conversations"][0]["value"].endswith("in detail.")


def test_prepare_data_labels(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / "1.jpg")
    assert prepare("--labels photos", tmp_path).returncode == 0
    assert "A cat." in (tmp_path / "out.json").read_text()
    assert prepare("--labels photos --make names", tmp_path).returncode == 0
    entries = json.loads((tmp_path / "out.json").read_text())
    assert {entry["conversations"][0]["value"] for entry in entries} == {"<image>\nDescribe the image."}
    assert [entry["conversations"][1]["value"] for entry in entries][:3] == ["cat", "cats", "a cat"]
    failed = prepare("--labels photos --split train", tmp_path)
    assert failed.returncode and "--splits" in failed.stderr and "Traceback" not in failed.stderr
