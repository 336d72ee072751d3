"""The ONNX decoder computes what PyTorch computes, up to the rounding of its inputs to 8 bits."""

from __future__ import annotations

import sys

import pytest
import torch

from mmchat import Message, SamplingOptions
from mmchat.inference import onnx_graph
from mmchat.inference.decoder import TorchDecoder, load_decoder
from mmchat.inference.onnx_decoder import OnnxDecoder, load_onnx_decoder
from mmchat.inference.onnx_graph import BLOCK, PARTS, pack_4bit, pack_8bit
from mmchat.inference.prefix_cache import PrefixCache
from mmchat.models.language_model import add_adapter, load_language_model
from mmchat.presets import get_preset
from tests.close import INT8_INPUT_ERROR, ONNX_RUN_TO_RUN, assert_close
from tests.conftest import ROOT

OTHER_CHANNELS = {f"{index}.{part}": torch.arange(4 if part == "down" else 2) for index in range(2) for part in PARTS}
PHOTO = ROOT / "examples" / "ball.jpg"


@pytest.fixture(scope="module")
def adapted(tiny):
    """A small Llama with an adapter that changes its logits."""
    model, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32)
    model = add_adapter(model, rank=4, alpha=8, dropout=0.0, base_name="tiny")
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    return model.eval()


@pytest.fixture(autouse=True)
def separate_cache(request, tmp_path, monkeypatch):
    if "adapted" in request.fixturenames:
        monkeypatch.setenv("MMCHAT_CACHE", str(tmp_path))


@torch.inference_mode()
@pytest.mark.parametrize("is_on", [True, False])
def test_logits_equal_the_models(adapted, is_on):
    decoder = load_onnx_decoder(adapted)
    torch.manual_seed(1)
    embeddings = torch.randn(1, 300, 64)
    pieces = [9, 1, 1, 30, 256, 1, 1, 1]  # tokens per prefill; the capacity has to grow in between
    ends = [sum(pieces[: index + 1]) for index in range(len(pieces))]
    cache = decoder.new_cache(with_adapter=is_on)
    near = torch.cat([decoder.prefill(part, cache).clone() for part in embeddings.split(pieces, dim=1)])
    with_adapter = adapted(inputs_embeds=embeddings).logits[0, [end - 1 for end in ends]]
    with adapted.disable_adapter():
        without = adapted(inputs_embeds=embeddings).logits[0, [end - 1 for end in ends]]
    exact, other = (with_adapter, without) if is_on else (without, with_adapter)
    assert cache.length == 300
    assert (near - exact).std() < INT8_INPUT_ERROR * exact.std() < 0.2 * (near - other).std()


@torch.inference_mode()
@pytest.mark.parametrize("targets", [["k_proj", "up_proj"], ["0.self_attn.k_proj"], ["1.mlp.up_proj"]])
def test_an_adapter_on_some_layers_only(tiny, monkeypatch, tmp_path, targets):
    monkeypatch.setenv("MMCHAT_CACHE", str(tmp_path))
    model, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32)
    model = add_adapter(model, rank=4, alpha=8, dropout=0.0, base_name="tiny", target_modules=targets)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    embeddings = torch.randn(1, 9, 64)
    decoder = load_onnx_decoder(model)
    near = decoder.prefill(embeddings, decoder.new_cache())[0]
    exact = model(inputs_embeds=embeddings).logits[0, -1]
    assert (near - exact).std() < INT8_INPUT_ERROR * exact.std()


@torch.inference_mode()
@pytest.mark.parametrize("kind", [TorchDecoder, load_onnx_decoder])
def test_caches_are_independent(adapted, kind):
    """Two conversations with a common prefix, decoded in turns; both caches are copies of its first tokens."""
    decoder = kind(adapted)
    torch.manual_seed(1)
    beginning, *parts = torch.randn(1, 10, 64).split([6, 1, 2, 1], dim=1)
    longer = decoder.new_cache()
    decoder.prefill(torch.cat([beginning, parts[0]], dim=1), longer)
    first = longer.prefix(6)
    second = first.prefix(6)
    assert first.length == second.length == 6 and second.size > 0
    logits = [[decoder.prefill(part, cache).clone() for cache in (first, second)] for part in parts]
    assert all(torch.equal(one, other) for one, other in logits)  # the same arithmetic on the same numbers
    decoder.prefill(parts[0], second)
    alone = decoder.new_cache()
    expected = [decoder.prefill(part, alone).clone() for part in (beginning, *parts)][1:]
    for (one, _), other in zip(logits, expected, strict=True):
        assert_close(one, other, ONNX_RUN_TO_RUN)  # the beginning is prefilled in other pieces


def test_packing_few_levels_is_lossless():
    codes = torch.randint(0, 16, (7, 3, BLOCK)).float()
    codes[:, :, 0], codes[:, :, 1] = 0, 15
    scale, lowest = torch.rand(2, 7, 3, 1) * torch.tensor([[1e-3], [1.0], [0.0]])  # one block is constant
    packed, found_scale, found_lowest = pack_4bit((lowest - 0.5 + codes * scale).view(7, -1))
    unpacked = torch.stack([packed % 16, packed // 16], dim=3).view(7, 3, BLOCK)
    assert_close(unpacked * found_scale[:, :, None] + found_lowest[:, :, None], lowest - 0.5 + codes * scale, 1e-6)
    signed = torch.randint(-127, 128, (7, 2, BLOCK)).float()
    signed[:, :, 5] = -127
    signed[2, 1] = 0
    packed, found_scale = pack_8bit(0.01 * signed.view(7, -1))
    assert_close((packed - 128.0) * found_scale[:, :, None], 0.01 * signed, 1e-6)


def test_weights_with_many_levels_are_not_packed():
    assert pack_4bit(torch.randn(4, 64)) is None and pack_8bit(torch.randn(4, 64)) is None
    assert pack_4bit(torch.zeros(4, 40)) is None


@torch.inference_mode()
def test_channels_with_large_values_are_multiplied_in_fp32(tiny, monkeypatch, tmp_path):
    """Otherwise the channels that share their blocks would drown in the rounding of the large values."""
    monkeypatch.setenv("MMCHAT_CACHE", str(tmp_path))
    model, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32)
    for layer in model.get_decoder().layers:
        layer.input_layernorm.weight[[3, 40]] = 50
        layer.post_attention_layernorm.weight[[7, 33]] = 50
    embeddings = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(3))
    exact = model(inputs_embeds=embeddings).logits[0, -1]
    decoder = load_onnx_decoder(model)
    error = (decoder.prefill(embeddings, decoder.new_cache())[0] - exact).std()
    assert error < INT8_INPUT_ERROR * exact.std()
    monkeypatch.setenv("MMCHAT_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(onnx_graph, "outlier_channels", lambda _: OTHER_CHANNELS)
    decoder = load_onnx_decoder(model)
    assert (decoder.prefill(embeddings, decoder.new_cache())[0] - exact).std() > 3 * error


@torch.inference_mode()
def test_rows_without_the_adapter_are_as_if_there_were_none(adapted):
    """Beside a row with the adapter, too."""
    decoder, embeddings = load_onnx_decoder(adapted), torch.randn(1, 7, 64)
    bare, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32)
    plain = load_onnx_decoder(bare)
    alone = step(plain, embeddings, [False])[0]
    found = step(decoder, embeddings, [True, False, True])
    assert_close(step(decoder, embeddings, [False])[0], alone)
    assert_close(found[1], alone, ONNX_RUN_TO_RUN)
    assert_close(found[0], found[2], ONNX_RUN_TO_RUN)
    assert (found[0] - alone).std() > 0.5 * alone.std()


def step(decoder, embeddings, adapters):
    """Logits of one token after the embeddings, in rows with and without the adapter side by side."""
    caches = [decoder.new_cache(with_adapter) for with_adapter in adapters]
    rows = []
    for cache in caches:
        decoder.prefill(embeddings, cache)
        rows.append(decoder.batch.rows.add(cache))
    logits = dict(decoder.batch.rows.step(dict.fromkeys(rows, 5)))
    for row in rows:
        decoder.batch.rows.remove(row)
    return [logits[row].clone() for row in rows]


def test_unsupported_models_fall_back_to_pytorch(tiny, adapted, monkeypatch, caplog):
    for preset in ("phi-patches", "phi3-patches"):
        model, _ = load_language_model(get_preset(preset).language_model, torch.float32)
        assert load_onnx_decoder(model) is None
    quantized, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32, "4bit")
    assert load_onnx_decoder(quantized) is None
    fine, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32)
    fine.get_decoder().layers[-1].mlp.down_proj.weight.data.normal_()
    assert load_onnx_decoder(fine) is None
    monkeypatch.setenv("MMCHAT_DECODER", "torch")
    assert type(load_decoder(adapted)) is TorchDecoder
    monkeypatch.delenv("MMCHAT_DECODER")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert load_onnx_decoder(adapted) is None and "decoding with PyTorch" in caplog.text


@torch.inference_mode()
def test_models_of_the_same_shape_get_their_own_decoders(adapted, tiny):
    other, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32)
    other.get_decoder().layers[-1].mlp.up_proj.weight.data.neg_()
    logits = [
        decoder.prefill(torch.ones(1, 3, 64), decoder.new_cache(with_adapter=False))
        for decoder in (load_onnx_decoder(adapted), load_onnx_decoder(other))
    ]
    assert not torch.allclose(*logits, atol=0.1)


def test_the_real_model_answers_as_in_pytorch(engine, monkeypatch):
    messages, options = [Message("user", "Name the capital of France.")], SamplingOptions(0, max_new_tokens=24)
    assert isinstance(engine.decoder, OnnxDecoder)
    fast = "".join(engine.reply(messages, options))
    exact = TorchDecoder(engine.model.language_model)
    monkeypatch.setattr(engine, "decoder", exact)
    monkeypatch.setattr(engine, "prefix_cache", PrefixCache(exact, 0))
    assert "".join(engine.reply(messages, options)) == fast == "The capital of France is Paris."


def test_an_answer_does_not_depend_on_the_prefix_cache(engine):
    options = SamplingOptions(temperature=0, max_new_tokens=12)
    first = [Message("user", "What color is the ball?", images=[PHOTO])]
    said = "".join(engine.reply(first, options))
    second = [*first, Message("assistant", said), Message("user", "Is there a dog?")]
    cached = "".join(engine.reply(second, options))
    engine.forget()
    assert "".join(engine.reply(second, options)) == cached
