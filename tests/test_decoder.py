"""Answers written in 8 bits by ONNX Runtime are those of the model itself, but for rounding."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache

from mmchat import Message, SamplingOptions
from mmchat.decoder import BLOCK, load_decoder, quantize_blocks
from mmchat.language_model import add_adapter, load_language_model
from mmchat.presets import get_preset
from tests.conftest import ROOT

PHOTO = ROOT / "examples" / "ball.jpg"


@pytest.fixture(scope="module")
def adapted(tiny):
    """A small Llama with an adapter that changes what it says."""
    model, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32)
    model = add_adapter(model, rank=4, alpha=8, dropout=0.0, base_name="tiny")
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    return model.eval()


@pytest.fixture(autouse=True)
def cache_of_its_own(request, tmp_path, monkeypatch):
    if "adapted" in request.fixturenames:
        monkeypatch.setenv("MMCHAT_CACHE", str(tmp_path))


def read(model, embeddings):
    cache = DynamicCache(config=model.config)
    model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
    return cache


@torch.inference_mode()
@pytest.mark.parametrize("is_on", [True, False])
def test_logits_are_the_models_but_for_rounding(adapted, is_on):
    decoder = load_decoder(adapted)
    torch.manual_seed(1)
    embeddings, token_ids = torch.randn(1, 9, 64), [5, 200, 7, 31, 90]
    with nullcontext() if is_on else adapted.disable_adapter():
        writing = decoder.start(read(adapted, embeddings), len(token_ids))
        near = torch.cat([writing.read(token_id).clone() for token_id in token_ids])
        written = adapted.get_input_embeddings()(torch.tensor([token_ids]))
        exact = adapted(inputs_embeds=torch.cat([embeddings, written], dim=1)).logits[0, -len(token_ids) :]
    with adapted.disable_adapter() if is_on else nullcontext():
        other = adapted(inputs_embeds=torch.cat([embeddings, written], dim=1)).logits[0, -len(token_ids) :]
    assert (near - exact).std() < 0.05 * exact.std() < 0.1 * (near - other).std()


@torch.inference_mode()
def test_an_adapter_may_be_on_some_layers_only(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("MMCHAT_CACHE", str(tmp_path))
    model, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32)
    model = add_adapter(model, rank=4, alpha=8, dropout=0.0, base_name="tiny", target_modules=["k_proj", "up_proj"])
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    embeddings = torch.randn(1, 9, 64)
    near = load_decoder(model).start(read(model, embeddings), 1).read(5)[0]
    written = model.get_input_embeddings()(torch.tensor([[5]]))
    exact = model(inputs_embeds=torch.cat([embeddings, written], dim=1)).logits[0, -1]
    assert (near - exact).std() < 0.05 * exact.std()


@torch.inference_mode()
def test_two_answers_at_once_do_not_disturb_each_other_or_what_was_read(adapted):
    decoder = load_decoder(adapted)
    torch.manual_seed(1)
    cache = read(adapted, torch.randn(1, 6, 64))
    before = [layer.keys.clone() for layer in cache.layers]
    alone = decoder.start(cache, 3)
    expected = [alone.read(token_id).clone() for token_id in (1, 2, 3)]
    first, second = decoder.start(cache, 3), decoder.start(cache, 8)
    for token_id, other, logits in zip((1, 2, 3), (9, 8, 7), expected, strict=True):
        second.read(other)
        assert torch.equal(first.read(token_id), logits)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))


def test_rounding_to_eight_bits():
    weight = torch.randn(7, 100)
    weight[3, 40] = 100.0  # an outlier costs the precision of its own block only
    levels, scale = quantize_blocks(weight)
    near = ((levels.float() - 128) * scale[:, :, None]).view(7, -1)[:, :100]
    assert levels.shape == (7, 4, BLOCK) and scale.shape == (7, 4)
    error = (near - weight).abs()
    error[3, 32:64] = 0
    assert error.max() <= weight[weight < 50].abs().max() / 127 / 2 + 1e-6


def test_where_there_is_none_the_model_writes(tiny, adapted, monkeypatch, caplog):
    for preset in ("phi-patches", "phi3-patches"):
        model, _ = load_language_model(get_preset(preset).language_model, torch.float32)
        assert load_decoder(model) is None
    four_bits, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32, "4bit")
    assert load_decoder(four_bits) is None
    monkeypatch.setenv("MMCHAT_DECODER", "torch")
    assert load_decoder(adapted) is None
    monkeypatch.delenv("MMCHAT_DECODER")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert load_decoder(adapted) is None and "written by PyTorch" in caplog.text


def test_a_model_of_the_same_shape_is_not_taken_for_another(adapted, tiny):
    first = load_decoder(adapted)
    other, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32)
    other.get_decoder().layers[-1].mlp.up_proj.weight.data.neg_()
    second = load_decoder(other)
    with torch.inference_mode(), adapted.disable_adapter():
        cache = read(adapted, torch.zeros(1, 3, 64))
        assert not torch.allclose(first.start(cache, 1).read(5), second.start(cache, 1).read(5), atol=0.1)


@pytest.mark.parametrize("messages", [[Message("user", "What is the capital of France?")]], ids=["text"])
def test_the_real_model_says_the_same(engine, messages, monkeypatch):
    options = SamplingOptions(temperature=0, max_new_tokens=24)
    assert engine.decoder
    fast = "".join(engine.reply(messages, options))
    monkeypatch.setattr(engine, "decoder", None)
    assert "".join(engine.reply(messages, options)) == fast == "The capital of France is Paris."


def test_a_follow_up_reads_what_was_written_in_full_precision(engine):
    """So that an answer never depends on whether the one before it is still remembered."""
    options = SamplingOptions(temperature=0, max_new_tokens=12)
    first = [Message("user", "What color is the ball?", images=[PHOTO])]
    said = "".join(engine.reply(first, options))
    second = [*first, Message("assistant", said), Message("user", "Is there a dog?")]
    remembered = "".join(engine.reply(second, options))
    engine._readings._kept.clear()
    assert "".join(engine.reply(second, options)) == remembered
