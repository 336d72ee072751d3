"""From captions to a folder that chats, in small."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter

import pytest
import torch

from mmchat import Message, SamplingOptions, load
from mmchat.errors import BadInput
from mmchat.model import IGNORED
from mmchat.prompt import CHAT_FORMATS, IMAGE_TOKEN_ID
from mmchat.training.captions import conversations, questions, seen_objects, tidy_caption
from mmchat.training.data import Conversation, ConversationDataset, FeatureStore, collate, read_conversations
from mmchat.training.metrics import corpus_bleu4
from tests.conftest import ROOT

CAPTIONS = [
    "A brown dog runs with two boys .",
    "The brown dog is running on grass",
    "Two boys and a dog play",
    "A dog and children in the park .",
    "Kids play with their pet",
]


def test_captions_become_sentences():
    assert tidy_caption("a dog runs , fast  .") == "A dog runs, fast."


def test_questions_ask_only_what_two_captions_agree_on():
    seen = Counter(dog=50, boy=20, car=10, girl=5)
    asked = {
        (question.kind, question.subject): question.answer
        for seed in range(20)
        for question in questions(CAPTIONS, seen, random.Random(seed))
    }
    assert asked["presence", "dog"] == "Yes." and asked["presence", "boy"] == "Yes."
    assert asked["presence", "car"] == "No."
    assert ("presence", "girl") not in asked  # "children" may be girls
    assert asked["color", "dog"] == "Brown." and asked["count", "boy"] == "Two."
    assert set(seen_objects(CAPTIONS)) == {"dog", "boy"}


def test_conversations_are_read_back_as_written(tmp_path):
    entries = list(conversations([{"image": "a.jpg", "captions": CAPTIONS}], random.Random(0)))
    path = tmp_path / "train.json"
    path.write_text(json.dumps(entries))
    read = read_conversations(path)
    assert len(read) == 5
    for conversation in read:
        first, *rest = conversation.messages
        assert first.images == ("a.jpg",) and "<image>" not in first.text
        assert not any(message.images for message in rest)
        assert [message.role for message in conversation.messages[:2]] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("not json", "train.json cannot be read"),
        ('{"a": 1}', "not a list"),
        ('[{"id": "x"}]', "entry 0"),
        ('[{"conversations": [{"from": "human", "value": "hi"}]}]', "entry 0 has no answer"),
        ('[{"conversations": [{"from": "alien", "value": "hi"}]}]', "entry 0"),
    ],
)
def test_bad_training_files_are_named(tmp_path, content, says):
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(BadInput, match=says):
        read_conversations(tmp_path / "train.json")


def test_bleu_is_one_for_equal_texts_and_small_for_others():
    references = [["A dog runs on the green grass.", "a brown dog"], ["Two men climb a steep rock wall."]]
    assert corpus_bleu4(["a dog runs on the green grass", "two men climb a steep rock wall"], references) == 1
    assert corpus_bleu4(["two men climb a steep rock wall", "a dog runs on the green grass"], references) < 0.01


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two photos, their features and conversations, made by the scripts as a person would run them."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "photos").mkdir()
    for name in ("coffee.jpg", "astronaut.jpg"):
        (folder / "photos" / name).write_bytes((ROOT / "examples" / name).read_bytes())
    captions = [
        {"image": "coffee.jpg", "captions": ["A cup of coffee on a wooden table ."] * 5},
        {"image": "astronaut.jpg", "captions": ["A woman in an orange suit smiles ."] * 5},
    ]
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "splits.json").write_text(json.dumps({"train": ["coffee.jpg", "astronaut.jpg"]}))
    script(folder, "prepare_data.py --captions captions.json --splits splits.json --out train.json")
    script(folder, "embed_images.py --images photos --out features")
    return folder


def script(folder, command):
    name, *arguments = command.split()
    path = ROOT / "training_scripts" / name
    return subprocess.run(
        [sys.executable, str(path), *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout


def test_batches_are_padded_and_labelled(prepared, engine):
    store = FeatureStore(prepared / "features")
    found = read_conversations(prepared / "train.json")
    dataset = ConversationDataset(found, store, engine.tokenizer, CHAT_FORMATS["smollm2"])
    batch = collate([dataset[0], dataset[-1], dataset[3]])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert batch["image_features"].shape == (3, 17, 1280)
    assert (batch["input_ids"] == IMAGE_TOKEN_ID).sum() == 3 * 17
    assert ((batch["labels"] != IGNORED) <= (batch["attention_mask"] == 1)).all()
    torch.testing.assert_close(
        batch["image_features"][0], engine._image_features(prepared / "photos" / "coffee.jpg"), atol=2e-2, rtol=2e-2
    )


def test_a_picture_without_features_is_named_before_training(prepared, engine):
    conversation = Conversation("x-1", (Message("user", "What?", ["x.jpg"]), Message("assistant", "A dog.")))
    with pytest.raises(BadInput, match=r"x-1 shows 'x\.jpg'"):
        ConversationDataset(
            [conversation], FeatureStore(prepared / "features"), engine.tokenizer, CHAT_FORMATS["smollm2"]
        )


@pytest.mark.slow
def test_training_learns_and_its_folder_chats(prepared):
    script(
        prepared,
        "finetune.py --train train.json --features features --out run --max-steps 12 --batch-size 4 --warmup 1"
        " --lr 2e-3 --projector-lr 2e-3 --save-steps 6 --log-steps 3",
    )
    log = json.loads((prepared / "run" / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    assert log[-2]["loss"] < 0.7 * log[0]["loss"]
    greedy = SamplingOptions(temperature=0, max_new_tokens=16)
    for weights in ("run", "run/checkpoint-12"):
        trained = load("smol", prepared / weights)
        answers = {
            name: "".join(
                trained.reply([Message("user", "Describe the image.", images=[prepared / "photos" / name])], greedy)
            )
            for name in ("coffee.jpg", "astronaut.jpg")
        }
        assert "coffee" in answers["coffee.jpg"] and "orange" in answers["astronaut.jpg"], answers
    earlier = load("smol", prepared / "run" / "checkpoint-6").model.state_dict()
    later = trained.model.state_dict()
    for name, weight in later.items():
        is_trained = "lora_" in name or name.startswith("projector.")
        assert torch.equal(weight, earlier[name]) != is_trained, name


def test_scripts_explain_themselves():
    for path in sorted((ROOT / "training_scripts").glob("*.py")):
        shown = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, check=True).stdout
        assert "python training_scripts/" in shown
