"""Captions and easy-VQA → conversations."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from PIL import Image

from mmchat.errors import BadInput
from mmchat.training.data import easy_vqa
from mmchat.training.data.captions import conversations, descriptions, questions_only, read_captions, tidy_caption
from mmchat.training.data.llava_json import write_conversations
from mmchat.training.data.questions import ask
from mmchat.training.evaluation.evaluator import read_items

DOGS = [
    "A brown dog runs with two boys .",
    "The brown dog is running on grass",
    "Two boys and a dog run in the grass",
    "A dog and children in the park .",
    "Kids play with their pet",
]
CAR = ["A red car on a road ."] * 3 + ["A red car drives .", "The car is fast"]


def asked(*pictures: list[str], seed: int = 0):
    """(kind, subject) → answer, for the first picture."""
    described = [{"image": f"{number}.jpg", "captions": captions} for number, captions in enumerate(pictures)]
    return {(question.kind, question.subject): question.answer for question in ask(described, random.Random(seed))[0]}


def test_captions_become_sentences():
    assert tidy_caption("a dog runs , fast  .") == "A dog runs, fast."


def test_questions_need_two_captions_that_agree():
    found = asked(DOGS, CAR)
    assert found["color", "dog"] == "Brown." and found["count", "boy"] == "Two."
    assert found["where", "boy"] == "On the grass."
    assert found["presence", "dog"] == "Yes."
    assert ("presence", "girl") not in found  # "children" may be girls


@pytest.mark.parametrize(
    ("captions", "key", "answer"),
    [
        (["A man in a red and white shirt ."] * 3, ("color", "shirt"), None),  # two colors are no color
        (["A man in a red shirt .", "A man in a red shirt", "A blue shirt"], ("color", "shirt"), None),  # a dispute
        (["Two dogs .", "Two dogs play", "Three dogs"], ("count", "dog"), None),
        (["Three young girls swim in a pool"] * 2, ("count", "girl"), "Three."),
        (["Three girls swim in a pool"] * 2, ("where", "girl"), "In a pool."),
        (["A woman climbs a rock"] * 2, ("doing", "woman"), "Climbing."),
        (["A woman and a dog run"] * 2, ("doing", "woman"), None),  # who runs?
        (["A woman and two boys sit"] * 2, ("who", "person"), "A woman and two boys."),
    ],
)
def test_rules(captions, key, answer):
    assert asked(captions, CAR).get(key) == answer


def test_one_uncontradicted_caption_suffices_for_a_color():
    captions = ["A boy in a red shirt .", "A boy runs", "A boy in a blue hat", "A boy in a green hat"]
    pictures = [{"image": "0.jpg", "captions": captions}]
    (questions,) = ask(pictures, random.Random(0), agreement=1)
    assert {question.subject: question.answer for question in questions if question.kind == "color"} == {
        "shirt": "Red."
    }


def test_no_description_contains_the_answer_of_a_follow_up():
    captions = ["A brown dog runs .", "The brown dog runs .", "A dog is running", "A dog plays"]
    followed = 0
    for seed in range(20):
        for entry in conversations([{"image": "0.jpg", "captions": captions}], random.Random(seed)):
            said = [turn["value"] for turn in entry["conversations"] if turn["from"] == "gpt"]
            if "Brown." in said[1:]:
                followed += 1
                assert "brown" not in said[0]
    assert followed


def test_yes_and_no_are_balanced_per_object():
    pictures = [{"image": str(number), "captions": captions} for number, captions in enumerate([DOGS, CAR] * 20)]
    answers = Counter(
        (question.subject, question.answer)
        for questions in ask(pictures, random.Random(1))
        for question in questions
        if question.kind == "presence"
    )
    assert answers["dog", "Yes."] == 20
    for subject, answer in list(answers):
        assert answers[subject, answer] == answers[subject, "Yes." if answer == "No." else "No."], subject


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ours.json", [{"image": "a.jpg", "captions": ["One dog .", "Two dogs ."]}]),
        (
            "coco.json",
            {
                "images": [{"id": 4, "file_name": "a.jpg"}, {"id": 5, "file_name": "none.jpg"}],
                "annotations": [{"image_id": 4, "caption": "One dog ."}, {"image_id": 4, "caption": "Two dogs ."}],
            },
        ),
        (
            "karpathy.json",
            {
                "images": [
                    {"filename": "a.jpg", "split": "val", "sentences": [{"raw": "One dog ."}, {"raw": "Two dogs ."}]}
                ]
            },
        ),
        ("flickr.token.txt", "a.jpg#0\tOne dog .\na.jpg#1\tTwo dogs .\n"),
        ("kaggle.txt", 'image,caption\na.jpg,One dog .\na.jpg,"Two dogs ."\n'),
    ],
)
def test_every_caption_format_is_read(tmp_path, name, content):
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    (picture,) = read_captions(tmp_path / name)
    assert picture["image"] == "a.jpg" and picture["captions"] == ["One dog .", "Two dogs ."]
    assert picture["split"] == ("val" if "karpathy" in name else None)


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"images": [{}]}', "no captions here\nnor here"])
def test_unknown_formats_are_errors(tmp_path, content):
    (tmp_path / "odd.txt").write_text(content)
    with pytest.raises(BadInput, match=r"odd\.txt"):
        read_captions(tmp_path / "odd.txt")


def test_conversations_contain_every_caption_and_every_question():
    pictures = [{"image": "a.jpg", "captions": DOGS}, {"image": "b.jpg", "captions": CAR}]
    entries = list(conversations(pictures, random.Random(3)))
    turns = [turn["value"] for entry in entries for turn in entry["conversations"]]
    assert all(tidy_caption(caption) in turns for caption in DOGS + CAR)
    assert all(entry["conversations"][0]["value"].startswith("<image>\n") for entry in entries)
    described = {entry["conversations"][0]["value"] for entry in entries if tidy_caption(DOGS[0]) in str(entry)}
    assert len(described) == 1
    few = list(conversations(pictures, random.Random(3), per_image=2, apart=True))
    assert all(len(entry["conversations"]) == 2 for entry in few) and len(few) == len(DOGS + CAR) + 2 * len(pictures)
    plain = list(conversations(pictures, random.Random(3), with_questions=False))
    assert len(plain) == 10 and all(len(entry["conversations"]) == 2 for entry in plain)


def test_numbers_are_evened_out():
    """Most captions count two; a model that is trained on them says two whatever it sees."""
    said = ["Two dogs run on grass."] * 12 + ["Three dogs run on grass."] * 5 + ["Four dogs run on grass."] * 2
    pictures = [{"image": f"{number}.jpg", "captions": [caption] * 3} for number, caption in enumerate(said)]

    def numbers(**options):
        entries = conversations(pictures, random.Random(3), apart=True, **options)
        return Counter(entry["conversations"][1]["value"] for entry in entries)

    every, even = numbers(), numbers(per_number=4)
    assert (every["Two."], every["Three."], every["Four."]) == (24, 10, 4)  # each is asked twice
    assert (even["Two."], even["Three."], even["Four."]) == (4, 4, 4)
    assert every["Yes."] == even["Yes."]


def test_evaluation_entries_are_read_back(tmp_path):
    pictures = [{"image": "a.jpg", "captions": DOGS}, {"image": "b.jpg", "captions": CAR}]
    write_conversations(tmp_path / "captions.json", descriptions(pictures))
    write_conversations(tmp_path / "questions.json", questions_only(pictures, random.Random(0)))
    captions = read_items(tmp_path / "captions.json")
    assert [item.kind for item in captions] == ["caption", "caption"] and len(captions[0].references) == 5
    assert captions[0].question[0].text == "Describe the image."
    kinds = {item.kind for item in read_items(tmp_path / "questions.json")}
    assert {"presence", "color", "count"} <= kinds
    colors = list(questions_only(pictures, random.Random(0), kinds=["color"]))
    assert colors and {entry["kind"] for entry in colors} == {"color"}


def test_easy_vqa_has_pictures_and_questions(tmp_path):
    assert easy_vqa.extract_pictures(tmp_path, "test", limit=3) == 3
    assert Image.open(tmp_path / "2.png").size == (64, 64)
    entries = list(easy_vqa.conversations("test", random.Random(0), limit=3, turns=2))
    assert {entry["image"] for entry in entries} == {"0.png", "1.png", "2.png"}
    assert all(2 <= len(entry["conversations"]) <= 4 for entry in entries)
    count = sum(1 for _ in easy_vqa.questions_only("test"))
    assert count == 9673
