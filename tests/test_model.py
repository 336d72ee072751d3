"""Splicing picture tokens, the loss, and weights on disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mmchat.checkpoints.weights_folder import load_model, save_weights
from mmchat.errors import WeightsError
from mmchat.models.projector import ProjectorConfig, build_projector
from mmchat.models.prompt import IMAGE_TOKEN_ID
from mmchat.models.vision_language_model import IGNORE_INDEX, VisionLanguageModel
from mmchat.training.loss import next_token_loss
from tests.close import assert_close

PROJECTORS = ("linear", "mlp", "resblock", "normblocks")


def tiny_model(kind="mlp"):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    projector_config = ProjectorConfig(kind, image_dim=8, intermediate_size=12, hidden_size=16, feature_count=3)
    return VisionLanguageModel(LlamaForCausalLM(config), build_projector(projector_config), projector_config)


def padded_batch():
    """Two conversations of different length; the second has a picture of three features."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 0, 0], [4, *[IMAGE_TOKEN_ID] * 3, 11, 12, 13, 14]])
    labels = torch.tensor([[IGNORE_INDEX] * 3 + [8, 9, 10] + [IGNORE_INDEX] * 2, [IGNORE_INDEX] * 6 + [13, 14]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


@pytest.mark.parametrize("kind", PROJECTORS)
def test_picture_tokens_replace_their_placeholders(kind):
    model = tiny_model(kind)
    features = torch.randn(2, 3, 8)
    ids = torch.tensor([[1, *[IMAGE_TOKEN_ID] * 3, 2, 3], [4, 5, *[IMAGE_TOKEN_ID] * 3, 6]])
    embeddings = model.splice(ids, features)
    tokens = model.language_model.get_input_embeddings()
    assert_close(embeddings[0, 1:4], model.projector(features[0]))
    assert_close(embeddings[1, 2:5], model.projector(features[1]))
    assert_close(embeddings[0, [0, 4, 5]], tokens(torch.tensor([1, 2, 3])))
    assert_close(embeddings[1, [0, 1, 5]], tokens(torch.tensor([4, 5, 6])))


@torch.no_grad()
def test_residual_blocks_add_an_mlp_of_the_norm():
    projector = build_projector(
        ProjectorConfig("resblock", image_dim=8, intermediate_size=12, hidden_size=16, feature_count=3)
    )
    tokens = projector.linear(features := torch.randn(2, 3, 8))
    assert_close(projector(features), tokens + projector.mlp.proj(projector.mlp.pre_norm(tokens)))


def test_an_end_of_image_token_follows_every_image():
    config = ProjectorConfig("linear", 8, 0, 16, feature_count=3, end_of_image_token=True)
    projector = build_projector(config)
    torch.nn.init.normal_(projector.marker)
    tokens = projector(torch.randn(2, 3, 8))
    assert tokens.shape == (2, config.tokens_per_image, 16) == (2, 4, 16)
    assert torch.equal(tokens[:, -1], projector.marker.expand(2, -1))


def test_configs_saved_under_old_names_load():
    stored = {
        "kind": "mlp",
        "image_width": 8,
        "hidden_width": 12,
        "token_width": 16,
        "feature_count": 3,
        "marker": True,
    }
    config = ProjectorConfig.from_json(stored)
    assert config == ProjectorConfig("mlp", 8, 12, 16, feature_count=3, end_of_image_token=True)
    assert ProjectorConfig.from_json(json.loads(json.dumps(asdict(config)))) == config
    for damaged in ({"kind": "mlp"}, {**stored, "color": "red"}, ["mlp"], None):
        with pytest.raises((TypeError, ValueError)):
            ProjectorConfig.from_json(damaged)


def test_features_without_placeholders_are_an_error():
    with pytest.raises(ValueError, match="3 IMAGE_TOKEN_IDs, but 4 image tokens"):
        tiny_model().splice(torch.tensor([[1, *[IMAGE_TOKEN_ID] * 3]]), torch.randn(1, 4, 8))


def test_the_loss_equals_cross_entropy_on_the_next_token_of_every_answer():
    model, batch, features = tiny_model(), padded_batch(), torch.randn(1, 3, 8)
    loss = next_token_loss(*model(**batch, image_features=features))
    embeddings = model.splice(batch["input_ids"], features)
    logits = model.language_model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 50), batch["labels"][:, 1:].reshape(-1), ignore_index=IGNORE_INDEX
    )
    assert_close(loss, expected)


def test_the_loss_is_weighted_smoothed_and_divided():
    logits, labels = torch.randn(4, 50), torch.tensor([8, 9, 13, 14])
    weights = torch.tensor([1.0, -0.5, 2.0, 0.0])
    target = torch.nn.functional.one_hot(labels, 50) * 0.9 + 0.1 / 50  # [labels, vocabulary]
    expected = (weights * -(target * logits.log_softmax(dim=-1)).sum(dim=-1)).sum() / 7
    loss = next_token_loss(logits, labels, num_items_in_batch=7, label_weights=weights, label_smoothing=0.1)
    assert_close(loss, expected)
    assert_close(next_token_loss(logits, labels), torch.nn.functional.cross_entropy(logits, labels))
    assert next_token_loss(logits[:0], labels[:0]) == 0


@pytest.mark.parametrize("kind", PROJECTORS)
def test_every_projector_weight_gets_a_gradient(kind):
    model = tiny_model(kind)
    model.language_model.requires_grad_(False)
    next_token_loss(*model(**padded_batch(), image_features=torch.randn(1, 3, 8))).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.projector.parameters())


def test_an_unknown_projector_kind_is_named():
    with pytest.raises(ValueError, match="magic"):
        build_projector(ProjectorConfig("magic", 1, 1, 1, 1))


@pytest.fixture
def weights_copy(engine, tmp_path):
    shutil.copytree(engine.preset.weights, tmp_path / "weights")
    return tmp_path / "weights"


def test_saved_weights_load_as_the_same_model(engine, smol_model, tmp_path):
    save_weights(smol_model, tmp_path / "copy", engine.preset)
    copy, _ = load_model(engine.preset, tmp_path / "copy", torch.float32)
    original = smol_model.state_dict()
    assert all(torch.equal(weight, original[name]) for name, weight in copy.state_dict().items())
    saved = (tmp_path / "copy" / "adapter" / "adapter_config.json").read_text()
    assert str(tmp_path) not in saved and "cache" not in json.loads(saved)["base_model_name_or_path"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "mmchat.json").unlink(), "not a weights folder"),
        (lambda folder: edit_config(folder, format_version=99), "format version 99"),
        (lambda folder: edit_config(folder, image_encoder="clip"), "image encoder 'clip'"),
        (lambda folder: (folder / "projector.safetensors").write_bytes(b"cut off"), "projector"),
        (lambda folder: drop_tensor(folder / "projector.safetensors"), "projector"),
        (lambda folder: (folder / "adapter" / "adapter_model.safetensors").unlink(), "adapter"),
        (lambda folder: (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"cut off"), "adapter"),
        (lambda folder: drop_tensor(folder / "adapter" / "adapter_model.safetensors"), "lacks 1 tensor and"),
    ],
    ids=[
        "no config",
        "newer format",
        "other encoder",
        "cut off",
        "projector tensor",
        "no adapter",
        "cut off adapter",
        "adapter tensor",
    ],
)
def test_weights_that_do_not_fit_are_rejected(engine, weights_copy, damage, says):
    damage(weights_copy)
    with pytest.raises(WeightsError, match=says) as caught:
        load_model(engine.preset, weights_copy, torch.float32)
    assert str(weights_copy.parent) not in str(caught.value)


def edit_config(folder, **changes):
    config = json.loads((folder / "mmchat.json").read_text())
    (folder / "mmchat.json").write_text(json.dumps({**config, **changes}))


def drop_tensor(path):
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)


def test_a_fresh_marker_starts_from_the_embedding_of_a_token(tiny):
    from mmchat.models.language_model import load_language_model
    from mmchat.presets import PRESETS
    from mmchat.training.recipe import Recipe
    from mmchat.training.run import build_model

    preset = PRESETS["phi3-patches"]
    data = {"train": [str(tiny / "train.json")], "features": str(tiny / "features-patches")}
    model, tokenizer = build_model(Recipe(**data, preset=preset.name, end_of_image_token=True), preset)
    base, _ = load_language_model(preset.language_model, torch.float32)
    token_id = tokenizer.encode("\n", add_special_tokens=False)[-1]
    assert torch.equal(model.projector.marker.data, base.get_input_embeddings().weight[token_id])
    assert model.projector.marker.requires_grad and model.projector.marker.abs().sum() > 0
