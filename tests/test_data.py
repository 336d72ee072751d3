"""Conversation files and packed sequences: packing must not change the loss of any conversation."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmchat import Message
from mmchat.errors import BadInput
from mmchat.models.chat_formats import CHAT_FORMATS
from mmchat.models.prompt import IMAGE_TOKEN_ID, TokenizedConversation
from mmchat.models.vision_language_model import IGNORE_INDEX
from mmchat.presets import get_preset
from mmchat.training.data.features import FeatureStore
from mmchat.training.data.llava_json import (
    Conversation,
    conversation_of,
    entry_of,
    read_conversations,
    split_by_image,
    stream_entries,
    write_conversations,
)
from mmchat.training.data.packing import ConversationDataset, collate, lay_out
from mmchat.training.loss import next_token_loss
from mmchat.training.recipe import Recipe
from mmchat.training.run import build_model
from tests.close import assert_close

FORMAT = CHAT_FORMATS["smollm2"]


def test_llava_instruct_files_are_read(tmp_path):
    (tmp_path / "llava.json").write_text(
        """[
  {
    "id": "000000033471",
    "image": "000000033471.jpg",
    "conversations": [
      {"from": "human", "value": "<image>\\nWhat are the colors of the bus in the image?"},
      {"from": "gpt", "value": "The bus in the image is white and red."},
      {"from": "human", "value": "What feature can be seen?\\n<image>"},
      {"from": "gpt", "value": "An advertisement; it says <image>."}
    ]
  },
  {"id": 7, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
]"""
    )
    bus, text_only = read_conversations(tmp_path / "llava.json")
    assert bus == Conversation(
        "000000033471",
        (
            Message("user", "What are the colors of the bus in the image?", ["000000033471.jpg"]),
            Message("assistant", "The bus in the image is white and red."),
            Message("user", "What feature can be seen?", ["000000033471.jpg"]),
            Message("assistant", "An advertisement; it says <image>."),
        ),
    )
    assert text_only.id == "7" and text_only.images == ()


def test_an_entry_may_show_several_pictures_in_a_row():
    turns = [("human", "<image>\n<image>\nWhich is red?"), ("gpt", "Picture 2."), ("human", "<image>\nAnd this?")]
    entry = {
        "image": ["a.jpg", "b.jpg", "c.jpg"],
        "conversations": [{"from": who, "value": what} for who, what in turns],
    }
    first, _, last = conversation_of(entry, "a test").messages
    assert (first.images, first.text) == (("a.jpg", "b.jpg"), "Which is red?")
    assert (last.images, last.text) == (("c.jpg",), "And this?")
    for images in (["a.jpg"], ["a.jpg"] * 4, [], [1]):
        with pytest.raises(BadInput):
            conversation_of({**entry, "image": images}, "a test")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("not json", "train.json is not a list"),
        ('{"a": 1}', "train.json is not a list"),
        ("[]", "train.json holds no conversations"),
        ('[\n{"id": "x"}]', 'train.json, line 2: an entry needs a list "conversations"'),
        ('[\n\n{"conversations": [{"from": "human", "value": "hi"}]}]', "line 3: there is no answer"),
        ('[{"conversations": [{"from": "alien", "value": "hi"}]}]', 'line 1: a turn needs "from"'),
        ('[{"conversations": [{"from": "human", "value": "<image> hi"}]}]', 'the entry has no "image"'),
        ('[{"conversations": [], "image": 3}]', '"image" must be a file name'),
        ('[{"a": 1}\n{"a": 2}]', "line 1: an entry needs"),
        ('[\n{"a": \n oops}]', "line 3: this is not JSON"),
        ("[\n1 2]", "line 2: an entry"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path, content, says):
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(BadInput, match=says):
        list(read_conversations(tmp_path / "train.json"))


def test_a_missing_comma_is_an_error(tmp_path):
    good = json.dumps(entry_of("a", None, [("Hi", "Hello")]))
    (tmp_path / "train.json").write_text(f"[{good}\n\n{good}]")
    with pytest.raises(BadInput, match="line 3: a comma"):
        list(read_conversations(tmp_path / "train.json"))


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(entries=st.lists(st.recursive(st.text() | st.integers(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))))
def test_streaming_any_json_list_equals_json_loads(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("stream") / "list.json"
    text = json.dumps(entries, indent=1, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    found = list(stream_entries(path))
    assert [entry for _, entry in found] == json.loads(text)
    lines = text.split("\n")
    for line, entry in found:
        assert lines[line - 1].strip().startswith(json.dumps(entry, ensure_ascii=False)[:1])


def test_long_files_are_read_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("mmchat.training.data.llava_json.CHUNK", 7)
    entries = [entry_of(str(number), "a.jpg", [("What?", f"Dog number {number}.")]) for number in range(50)]
    assert write_conversations(tmp_path / "many.json", entries) == 50
    read = list(read_conversations(tmp_path / "many.json"))
    assert [conversation.messages[-1].text for conversation in read] == [
        f"Dog number {number}." for number in range(50)
    ]


def test_splitting_keeps_the_questions_of_a_picture_together(tmp_path):
    entries = [entry_of(f"{number}", f"{number % 10}.jpg", [("What?", "A dog.")]) for number in range(40)]
    write_conversations(tmp_path / "all.json", entries)
    train, rest = split_by_image(tmp_path / "all.json", 0.3, random.Random(0))
    assert len(train) == 28 and len(rest) == 12
    assert not {entry["image"] for entry in train} & {entry["image"] for entry in rest}
    with pytest.raises(BadInput, match="between 0 and 1"):
        split_by_image(tmp_path / "all.json", 2, random.Random(0))
    (tmp_path / "names.json").write_text('["a.jpg", "b.jpg"]')
    with pytest.raises(BadInput, match=r"names.json is not a list of conversations"):
        split_by_image(tmp_path / "names.json", 0.5, random.Random(0))


class TestRows:
    """Packing saves computation and changes no result."""

    @pytest.fixture(scope="class", params=["phi3-patches", "phi-patches", "llama-patches"])
    def model(self, tiny, request):
        recipe = Recipe(train=["-"], features="-", preset=request.param)
        torch.manual_seed(0)
        model, tokenizer = build_model(recipe, get_preset(request.param))
        for name, weight in model.named_parameters():  # B of a fresh adapter is zero, so the adapter would do nothing
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        return model.eval(), tokenizer

    def dataset(self, tiny, tokenizer, **options):
        store = FeatureStore(tiny / "features-patches")
        return ConversationDataset(read_conversations(tiny / "train.json"), store, tokenizer, FORMAT, 4, **options)

    def test_the_packed_loss_equals_the_loss_of_each_conversation_alone(self, tiny, model):
        model, tokenizer = model
        shared, alone = self.dataset(tiny, tokenizer), self.dataset(tiny, tokenizer, pack=False)
        assert len(shared) == 12 and len(alone) == 24 and any(row.is_branched for row in shared.rows)
        gradients = []
        for dataset in (shared, alone):
            model.zero_grad()
            loss = next_token_loss(*model(**collate([dataset[index] for index in range(len(dataset))])))
            loss.backward()
            gradients.append([loss, *(weight.grad.clone() for weight in model.parameters() if weight.requires_grad)])
        for found, expected in zip(*gradients, strict=True):
            assert_close(found, expected, 1e-4)  # sums over all tokens of all conversations

    def test_the_loss_equals_that_of_transformers(self, tiny, model):
        """transformers shifts the labels itself, so this fails if labels are shifted twice or never."""
        model, tokenizer = model
        batch = collate([self.dataset(tiny, tokenizer, pack=False)[index] for index in range(6)])
        ours = next_token_loss(*model(**batch))
        theirs = model.language_model(
            inputs_embeds=model.splice(batch["input_ids"], batch["image_features"]),
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
        ).loss
        assert_close(ours, theirs)

    def test_eager_attention_gives_the_same_loss(self, tiny, model):
        model, tokenizer = model
        dataset = self.dataset(tiny, tokenizer)
        batch = collate([dataset[index] for index in range(4)])
        losses = []
        for attention in ("sdpa", "eager"):
            model.unwrapped_language_model.set_attn_implementation(attention)
            losses.append(next_token_loss(*model(**batch)))
        model.unwrapped_language_model.set_attn_implementation("sdpa")
        assert_close(*losses)


TOKENS = st.lists(st.integers(3, 5), min_size=1, max_size=6)


@settings(deadline=None)
@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=6), st.integers(8, 60))
def test_packed_sequences_contain_every_conversation(turns, max_length):
    """Following ``parent`` from the end of each branch gives back the conversations."""
    conversations = [
        TokenizedConversation(
            [1, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, *question, *answer],
            [False] * (3 + len(question)) + [True] * len(answer),
            ["a.jpg"],
        )
        for question, answer in turns
    ]
    found = []
    for row in lay_out(conversations, max_length):
        assert len(row) <= max(max_length, max(len(conversation.token_ids) for conversation in conversations))
        assert row.images == ["a.jpg"] and row.token_ids.count(IMAGE_TOKEN_ID) == 2
        followed = set(row.parent)
        for leaf in range(len(row)):
            if leaf not in followed:
                places = [leaf]
                while row.parent[places[0]] >= 0:
                    places.insert(0, row.parent[places[0]])
                assert [row.position[place] for place in places] == list(range(len(places)))
                # by ``subtree_end``, which the mask is made from, a token attends to its ancestors only
                assert [place for place in range(leaf + 1) if row.subtree_end[place] > leaf] == places
                found.append(([row.token_ids[place] for place in places], [row.is_answer[place] for place in places]))
    assert sorted(found) == sorted((one.token_ids, one.is_answer) for one in conversations)


def test_label_weights_follow_their_conversations():
    """Packing sorts the conversations; the answer tokens show which weight belongs to which."""
    weights = [3.0, -1.0, 2.0]
    conversations = [
        TokenizedConversation([1, 5, token_id, token_id], [False, False, True, True], []) for token_id in (30, 10, 20)
    ]
    (row,) = lay_out(conversations, 100, weights)
    batch = collate([{"row": row, "features": None}, {"row": lay_out(conversations[:1], 100)[0], "features": None}])
    weight_of = {30: [3.0, 1.0], 10: [-1.0], 20: [2.0]}
    labels = batch["labels"][batch["labels"] != IGNORE_INDEX].tolist()
    assert len(labels) == 8
    assert all(
        weight in weight_of[label] for label, weight in zip(labels, batch["label_weights"].tolist(), strict=True)
    )
    assert batch["label_weights"][-2:].tolist() == [1.0, 1.0]  # conversations without a weight count once
    assert "label_weights" not in collate([{"row": lay_out(conversations, 100)[0], "features": None}])


def test_batches_are_padded_and_labeled(tiny):
    _, tokenizer = build_model(Recipe(train=["-"], features="-", preset="phi3-patches"), get_preset("phi3-patches"))
    store = FeatureStore(tiny / "features-patches")
    dataset = ConversationDataset(read_conversations(tiny / "train.json"), store, tokenizer, FORMAT, 4)
    batch = collate([dataset[0], dataset[1], dataset[2]])
    assert batch["image_features"].shape == (3, 4, 24)
    assert (batch["input_ids"] == IMAGE_TOKEN_ID).sum() == 3 * 4
    is_label = batch["labels"] != IGNORE_INDEX
    assert is_label.any(dim=1).all() and (batch["input_ids"][is_label] == batch["labels"][is_label]).all()
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (batch["labels"] == ends).sum() == 1 + 3 + 6  # the stop token of every answer is a label


def test_long_conversations_are_truncated_and_empty_ones_dropped(tiny, caplog):
    _, tokenizer = build_model(Recipe(train=["-"], features="-", preset="phi3-patches"), get_preset("phi3-patches"))
    store = FeatureStore(tiny / "features-patches")
    conversations = list(read_conversations(tiny / "train.json"))
    full = ConversationDataset(conversations, store, tokenizer, FORMAT, 4, pack=False)
    longest = max(len(row) for row in full.rows)
    truncated = ConversationDataset(conversations, store, tokenizer, FORMAT, 4, pack=False, max_length=longest - 1)
    assert max(len(row) for row in truncated.rows) == longest - 1 and "were truncated" in caplog.text
    with pytest.raises(BadInput, match="within its first 6 tokens"):
        ConversationDataset(conversations, store, tokenizer, FORMAT, 4, max_length=6)


def test_a_picture_without_features_is_an_error(tiny):
    conversation = Conversation("x-1", (Message("user", "What?", ["x.jpg"]), Message("assistant", "A dog.")))
    with pytest.raises(BadInput, match=r"x-1 shows 'x\.jpg'"):
        ConversationDataset([conversation], FeatureStore(tiny / "features-patches"), None, FORMAT, 4)
