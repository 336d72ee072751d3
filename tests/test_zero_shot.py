"""Zero-shot classification: as transformers' CLIPModel does it, and only with a complete CLIP."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

from mmchat import __main__ as terminal
from mmchat.checkpoints.weights_folder import save_weights
from mmchat.engine import LocalEngine
from mmchat.errors import BadInput, WeightsError
from mmchat.models.image_encoder import find_image_encoder, load_image_encoder
from mmchat.models.language_model import load_language_model
from mmchat.models.projector import ProjectorConfig, build_projector
from mmchat.models.vision_language_model import VisionLanguageModel
from mmchat.models.zero_shot import PROMPT, load_zero_shot, read_names
from mmchat.presets import EFFICIENTNET_LITE2, PRESETS, HubRepository
from tests.close import assert_close
from tests.tiny import CLIP_WIDTHS

NAMES = ("dog", "umbrella", "traffic light", "a name of more words than fit into the text encoder")


@pytest.fixture(scope="module")
def clip(tiny, tmp_path_factory):
    """A small CLIP with both encoders and random weights, in the layout of a repository."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("whole-clip")
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    torch.manual_seed(0)
    text = {
        "vocab_size": len(vocab),
        "max_position_embeddings": 40,
        "bos_token_id": vocab["<|startoftext|>"],
        "eos_token_id": vocab["<|endoftext|>"],
        "initializer_factor": 20.0,  # large, so names differ
    }
    sizes = {key: CLIP_WIDTHS[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    text |= {**sizes, "num_attention_heads": 2, "projection_dim": 20}
    config = CLIPConfig(text_config=text, vision_config={**CLIP_WIDTHS, "projection_dim": 20}, projection_dim=20)
    CLIPModel(config).save_pretrained(folder)
    CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    shutil.copy(tiny / "clip" / "preprocessor_config.json", folder)
    return folder


@pytest.fixture(scope="module", params=["pooled", "patches"])
def clip_engine(request, clip, tmp_path_factory):
    """An engine whose preset takes the pooled embedding or the patches of that CLIP."""
    encoder = find_image_encoder(HubRepository(str(clip)), request.param)
    preset = replace(PRESETS[f"phi3-{request.param}"], image_encoder=encoder)
    language_model, _ = load_language_model(preset.language_model, torch.float32)
    shape = ProjectorConfig("mlp", encoder.image_dim, 8, language_model.config.hidden_size, encoder.feature_count)
    folder = tmp_path_factory.mktemp("weights")
    save_weights(VisionLanguageModel(language_model, build_projector(shape), shape), folder, preset)
    return LocalEngine(preset, folder)


@pytest.mark.parametrize("features", ["pooled", "patches"])
def test_probabilities_equal_those_of_transformers(clip, small_picture, features):
    from transformers import AutoTokenizer, CLIPModel

    encoder = load_image_encoder(find_image_encoder(HubRepository(str(clip)), features))
    images = [small_picture, small_picture.rotate(90)]
    found = load_zero_shot(NAMES, encoder.preset).probabilities(encoder.contrastive_embeddings(images))
    texts = [PROMPT.format(name) for name in NAMES]
    tokens = AutoTokenizer.from_pretrained(clip)(
        texts, padding=True, truncation=True, max_length=40, return_tensors="pt"
    )
    pixels = torch.stack([encoder.preprocess(image) for image in images])
    with torch.inference_mode():
        expected = CLIPModel.from_pretrained(clip)(**tokens, pixel_values=pixels).logits_per_image.softmax(dim=1)
    assert_close(found, expected)
    assert expected.max() > 2 * expected.min()  # else any wrong embedding would pass


def test_batching_names_does_not_change_probabilities(clip, small_picture, monkeypatch):
    encoder = load_image_encoder(find_image_encoder(HubRepository(str(clip))))
    embedding = encoder.contrastive_embeddings([small_picture])
    together = load_zero_shot(NAMES, encoder.preset).probabilities(embedding)
    monkeypatch.setattr("mmchat.models.zero_shot.BATCH_SIZE", 1)
    load_zero_shot.cache_clear()
    assert_close(load_zero_shot(NAMES, encoder.preset).probabilities(embedding), together)


def test_the_engine_classifies_among_given_names(clip_engine, small_picture):
    assert clip_engine.classes(small_picture) == []
    found = clip_engine.classes(small_picture, [*NAMES, "dog", ""])
    assert {tag.name for tag in found} <= set(NAMES) and found[0].probability >= found[-1].probability >= 0.1
    assert clip_engine.classes(small_picture, ["dog"])[0].probability == pytest.approx(1)
    assert clip_engine.model.tagger is None  # so the prompt has no tags, as in training
    with pytest.raises(BadInput, match="at least one name to look for"):
        clip_engine.classes(small_picture, [" "])
    with pytest.raises(BadInput, match="There is no picture"):
        clip_engine.classes("nowhere.jpg", NAMES)


def test_the_classes_command_with_names(clip_engine, small_picture, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mmchat.engine.load", lambda preset, weights, quantization, speech: clip_engine)
    small_picture.save(tmp_path / "noise.png")
    (tmp_path / "names.txt").write_text("dog\n\n  umbrella \n")
    assert terminal.main(["classes", str(tmp_path / "noise.png"), "--names", str(tmp_path / "names.txt")]) == 0
    shown = capsys.readouterr().out
    assert "noise.png: " in shown and ("dog " in shown or "umbrella " in shown) and shown.endswith("%\n")
    assert terminal.main(["classes", str(tmp_path / "noise.png"), "--names", str(tmp_path / "none.txt")]) == 1
    assert "none.txt cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"), [(b" \n\n", "has no names"), (b"\xff\xfe\x00d", "not a text file")], ids=["blank", "binary"]
)
def test_a_file_without_names_is_rejected(content, says, tmp_path):
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(BadInput, match=f"names.txt.*{says}"):
        read_names(tmp_path / "names.txt")


def without_text_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    halved = {name: tensor for name, tensor in tensors.items() if not name.startswith("text_")}
    save_file(halved, folder / "model.safetensors", {"format": "pt"})


def without_tokenizer(folder):
    for path in folder.glob("*token*"):
        path.unlink()


@pytest.mark.parametrize("damage", [without_text_weights, without_tokenizer])
def test_clip_without_its_text_encoder_is_rejected(clip, damage, tmp_path):
    shutil.copytree(clip, tmp_path / "half")
    encoder = find_image_encoder(HubRepository(str(tmp_path / "half")))
    damage(tmp_path / "half")
    with pytest.raises(BadInput, match="cannot look for names") as caught:
        load_zero_shot(NAMES, encoder)
    assert str(tmp_path) not in str(caught.value)


def test_other_image_encoders_are_rejected(tiny):
    for encoder in (
        EFFICIENTNET_LITE2,
        PRESETS["phi3-pooled"].image_encoder,
        find_image_encoder(HubRepository(str(tiny / "siglip"))),
    ):
        with pytest.raises(BadInput, match=f"{encoder.name} cannot look for names"):
            load_zero_shot(NAMES, encoder)


def test_clip_has_no_classifier_for_a_tagger(tiny):
    encoder = load_image_encoder(PRESETS["phi3-pooled"].image_encoder)
    with pytest.raises(WeightsError, match="tiny-clip has no classes"):
        _ = encoder.classifier
