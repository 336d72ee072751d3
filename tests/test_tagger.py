"""The tagger: fitting, tags, and their place in the prompts of training and chat."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mmchat.checkpoints.weights_folder import load_model, save_weights
from mmchat.conversation import Message
from mmchat.errors import BadInput, WeightsError
from mmchat.models.chat_formats import CHAT_FORMATS
from mmchat.models.prompt import IMAGE_TOKEN_ID, tokenize_conversation
from mmchat.models.tagger import TAGGER_FILE, Tag, Tagger, fingerprint_text, load_tagger, tag_text
from mmchat.presets import EFFICIENTNET_LITE0, EFFICIENTNET_LITE2
from mmchat.training.averaging import average_weights
from mmchat.training.data.labels import Labeled
from mmchat.training.data.llava_json import conversation_of, entry_of
from mmchat.training.data.packing import ConversationDataset
from mmchat.training.fit_tagger import TAGS_FILE, TrainingTags, Vocabulary, fit_tagger, read_classes

CELLS, IMAGE_DIM = 4, 8
SMALL = replace(EFFICIENTNET_LITE2, feature_count=CELLS + 1, image_dim=IMAGE_DIM)


def features_of(kind: int, number: int) -> torch.Tensor:
    """[CELLS + 1, IMAGE_DIM] with one large value, and noise."""
    cells = 0.1 * torch.randn(CELLS, IMAGE_DIM, generator=torch.Generator().manual_seed(100 * kind + number))
    cells[:, kind] += 1
    return torch.cat([cells, cells.mean(dim=0, keepdim=True)])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Features of dogs, kitchens and apples, and a tagger fitted to their captions and labels."""
    features = {
        f"{kind}/{n}": features_of(i, n) for i, kind in enumerate(("dog", "kitchen", "apple")) for n in range(60)
    }
    captioned = [
        {"image": f"dog/{n}", "captions": ["A brown dog runs .", "The brown dog .", "Something else ."]}
        for n in range(60)
    ]
    labeled = [Labeled(f"kitchen/{n}", scene="kitchen") for n in range(60)]
    labeled += [Labeled(f"apple/{n}", label="apple", fine="Pink Lady" if n % 2 else "") for n in range(60)]
    folder = tmp_path_factory.mktemp("tagger")
    head = (torch.eye(2, IMAGE_DIM) * 9, torch.zeros(2))
    vocabulary = Vocabulary(captioned, labeled)
    tagger = fit_tagger(SMALL, head, ["terrier", "stove"], vocabulary, features, folder)
    return folder, features, tagger, vocabulary


@pytest.mark.slow
def test_it_predicts_words_of_captions_and_labels(fitted):
    _, _, tagger, _ = fitted
    classes, words = tagger(features_of(0, 999))
    assert classes[0].name == "terrier" and classes[0].probability > 0.9
    assert {"dog", "brown", "brown dog"} <= {tag.name for tag in words}
    assert tagger(features_of(1, 999))[1][0].name == "kitchen"
    assert tagger(features_of(2, 999))[1][0].name == "apple"


def test_probabilities_match_the_share_of_captions(fitted):
    """Two of three captions say "brown dog"."""
    probabilities = {tag.name: tag.probability for tag in fitted[2](features_of(0, 999))[1]}
    assert probabilities["brown dog"] == pytest.approx(2 / 3, abs=0.1)


def test_unlabeled_words_have_a_small_weight(fitted):
    vocabulary = fitted[3]
    shares, weights = vocabulary.targets(["apple/0", "dog/0"])
    dog, apple, kitchen = (vocabulary.words.index(word) for word in ("dog", "apple", "kitchen"))
    assert shares[0, apple] == weights[0, apple] == 1  # it has this label
    assert weights[0, kitchen] == 1 and shares[0, kitchen] == 0  # a photo of an object does not show a room
    assert shares[0, dog] == 0 < weights[0, dog] < 1  # a dog may lie beside the apple
    assert weights[1, kitchen] == 1 > weights[1, apple]


def test_tags_of_training_pictures_come_from_held_out_classifiers(fitted):
    """A classifier fitted to other pictures gives other probabilities."""
    folder, features, tagger, _ = fitted
    tags = json.loads((folder / TAGS_FILE).read_text())
    assert tags.keys() == features.keys()
    dogs = [image for image in features if image.startswith("dog/")]
    seen = [{tag.name: round(tag.probability, 3) for tag in tagger(features[image])[1]} for image in dogs]
    unseen = [dict(tags[image][1]) for image in dogs]
    assert all("dog" in found for found in unseen) and unseen != seen


def test_training_drops_tags_at_random(fitted):
    folder, features, tagger, _ = fitted
    tags = TrainingTags(tagger, folder, features, seed=0)
    texts = [tags(image) for image in features]
    assert texts == [tags(image) for image in features]  # the same in every epoch, so resuming is exact
    assert 3 < texts.count(tag_text([], [])) < 45
    assert any("dog" not in text for text in texts[:60]) and sum("dog" in text for text in texts[:60]) > 30
    other = {"new": features["dog/3"]}
    assert "dog" in TrainingTags(tagger, folder, other, seed=1)("new")  # a new picture: the tagger itself predicts


def test_tag_text_has_classes_words_and_probabilities():
    assert (
        tag_text([Tag("espresso", 0.95)], [Tag("cup", 0.849), Tag("table", 1.0)]) == "Tags: espresso 9; cup 8, table 9"
    )


def test_a_saved_tagger_loads_again(fitted, tmp_path):
    tagger = fitted[2]
    tagger.save(tmp_path)
    read = load_tagger(tmp_path, SMALL)
    assert (read.classes, read.words) == (tagger.classes, tagger.words)
    assert read.text(features_of(0, 7)) == tagger.text(features_of(0, 7))
    halves = {name: tensor.half().float() for name, tensor in tagger.state_dict().items()}
    assert all(torch.equal(tensor, halves[name]) for name, tensor in read.state_dict().items())
    (tmp_path / TAGGER_FILE).write_bytes((tmp_path / TAGGER_FILE).read_bytes()[:-9])
    with pytest.raises(WeightsError, match="tagger in .* is damaged"):
        load_tagger(tmp_path, SMALL)
    assert load_tagger(tmp_path / "nothing", SMALL) is None


@pytest.mark.parametrize(
    "other",
    [
        replace(SMALL, image_dim=IMAGE_DIM + 1),
        replace(SMALL, resolution=256),
        replace(SMALL, feature_count=10),
        replace(SMALL, name="efficientnet-lite0"),
    ],
    ids=["image_dim", "resolution", "cells", "name"],
)
def test_a_tagger_of_another_encoder_is_rejected(fitted, other, tmp_path):
    fitted[2].save(tmp_path)
    says = f"tagger in .* was fitted to .*grid 5x8 of the whole image at 288.*{other.name}, {other.feature_kind}"
    with pytest.raises(WeightsError, match=says) as caught:
        load_tagger(tmp_path, other)
    assert str(tmp_path) not in str(caught.value)


def test_a_tagger_without_a_recorded_encoder_is_checked_by_size(tmp_path):
    Tagger(["terrier"], ["dog"], IMAGE_DIM).save(tmp_path)
    assert load_tagger(tmp_path, replace(SMALL, resolution=256)).classes == ["terrier"]
    with pytest.raises(WeightsError, match="features of size 8.*fit_tagger.py"):
        load_tagger(tmp_path, replace(SMALL, image_dim=IMAGE_DIM + 1))


def test_weights_with_a_tagger_of_another_encoder_are_rejected(engine, smol_model, tmp_path):
    encoder = engine.preset.image_encoder
    save_weights(smol_model, tmp_path, engine.preset)
    other = fingerprint_text(replace(encoder, resolution=256))
    Tagger(["terrier"], ["dog"], encoder.image_dim, other).save(tmp_path)
    with pytest.raises(WeightsError, match="at 256 pixels.*at 288 pixels"):
        load_model(engine.preset, tmp_path, torch.float32)


def test_training_with_another_encoder_drops_the_tagger(engine, smol_model, tmp_path):
    """The features have the same size but another meaning."""
    save_weights(smol_model, tmp_path, engine.preset)
    other = replace(engine.preset, image_encoder=replace(EFFICIENTNET_LITE0, resolution=288))
    assert load_model(other, tmp_path, torch.float32, any_encoder=True)[0].tagger is None
    assert load_model(engine.preset, tmp_path, torch.float32, any_encoder=True)[0].tagger


def test_tags_stand_between_the_picture_and_the_question(engine):
    tokenizer, chat_format = engine.tokenizer, CHAT_FORMATS["smollm2"]
    message = Message("user", "What is this?", ["a", "b"])
    encoded = tokenize_conversation(
        [message], tokenizer, chat_format, 2, image_text={"a": "Tags: cup 9; ", "b": ""}.get
    )
    shown = tokenizer.decode([0 if token == IMAGE_TOKEN_ID else token for token in encoded.token_ids])
    picture = tokenizer.decode([0, 0])
    assert (
        shown
        == f"<|im_start|>user\nPicture 1:\n{picture}\nTags: cup 9; \nPicture 2:\n{picture}\nWhat is this?<|im_end|>\n"
    )


def test_conversations_about_a_picture_share_its_tags(engine):
    conversations = [conversation_of(entry_of(str(n), "a", [(f"Question {n}?", "Yes.")]), "a test") for n in range(3)]
    dataset = ConversationDataset(
        conversations,
        {"a": torch.zeros(2, 4)},
        engine.tokenizer,
        CHAT_FORMATS["smollm2"],
        2,
        image_text=lambda _: "Tags: cup 9",
    )
    (row,) = dataset.rows
    assert engine.tokenizer.decode([token for token in row.token_ids if token >= 0]).count("cup 9") == 1


def test_the_engine_and_the_prompt_show_the_tags(engine, photo):
    tags = engine.classes(photo.with_name("coffee.jpg"))
    assert tags[0].probability >= tags[-1].probability and "espresso" in [tag.name for tag in tags]
    encoded = engine.tokenize([Message("user", "What is this?", [photo.with_name("coffee.jpg")])])
    assert "espresso" in engine.tokenizer.decode([token for token in encoded.token_ids if token >= 0])
    with pytest.raises(BadInput, match="There is no picture"):
        engine.classes("nowhere.jpg")


def test_saved_weights_include_the_tagger(engine, smol_model, tmp_path):
    save_weights(smol_model, tmp_path / "one", engine.preset)
    assert (tmp_path / "one" / TAGGER_FILE).exists()
    model, _ = load_model(engine.preset, tmp_path / "one", torch.float32)
    features = torch.rand(engine.preset.image_encoder.feature_count, engine.preset.image_encoder.image_dim)
    assert model.tags(features) == smol_model.tags(features)
    average_weights(tmp_path / "one", tmp_path / "one", 0.5, tmp_path / "average")
    assert (tmp_path / "average" / TAGGER_FILE).read_bytes() == (tmp_path / "one" / TAGGER_FILE).read_bytes()


@pytest.mark.parametrize("content", ["", "[1]", '[{"name": "cup"}]', '{"names": ["cup"]}'])
def test_an_invalid_file_of_classes_is_rejected(content, tmp_path):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(BadInput, match="classes.json"):
        read_classes(tmp_path / "classes.json")


def test_an_empty_vocabulary_is_rejected():
    with pytest.raises(BadInput, match="too few"):
        Vocabulary([{"image": "a", "captions": ["A dog .", "The dog ."]}], [])


def test_a_tagger_without_classes():
    tagger = Tagger([], ["cup"], IMAGE_DIM)
    assert tagger.text(torch.zeros(CELLS + 1, IMAGE_DIM)) == "Tags: ; cup 5"
