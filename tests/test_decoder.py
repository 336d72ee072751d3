"""llama.cpp and OpenVINO compute what PyTorch computes, up to the rounding of weights and inputs to 8 bits."""

from __future__ import annotations

import platform

import pytest
import torch

from mmchat import Message, SamplingOptions
from mmchat.inference import llama_cpp, llama_decoder, openvino_decoder
from mmchat.inference.decoder import TorchDecoder, load_decoder
from mmchat.inference.llama_decoder import LlamaDecoder, load_llama_decoder
from mmchat.inference.openvino_decoder import load_openvino_decoder
from mmchat.inference.prefix_cache import PrefixCache
from mmchat.models.language_model import add_adapter, load_language_model
from mmchat.presets import get_preset
from tests.close import INT8_ERROR, INT8_RUN_TO_RUN, assert_close
from tests.conftest import ROOT
from tests.tiny import adapted_model

PHOTO = ROOT / "examples" / "ball.jpg"


@pytest.fixture(scope="module", params=["llama-patches", "phi3-patches", "phi-patches"])
def adapted(tiny, request):
    return adapted_model(request.param)


@pytest.fixture(autouse=True)
def separate_cache(request, tmp_path, monkeypatch):
    if "adapted" in request.fixturenames:
        monkeypatch.setenv("MMCHAT_CACHE", str(tmp_path))


@pytest.fixture(params=[load_llama_decoder, load_openvino_decoder], ids=["llama.cpp", "openvino"])
def load(request, monkeypatch):
    """Loads a decoder of a model, or returns None."""
    monkeypatch.setenv("MMCHAT_DECODER", "openvino" if request.param is load_openvino_decoder else "")
    return request.param


@torch.inference_mode()
@pytest.mark.parametrize("is_on", [True, False])
def test_logits_equal_the_models(adapted, is_on, load):
    decoder = load(adapted)
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
    assert (near - exact).std() < INT8_ERROR * exact.std() < 0.3 * (near - other).std()


@torch.inference_mode()
@pytest.mark.parametrize("targets", [["k_proj", "up_proj"], ["0.self_attn.k_proj"], ["1.mlp.up_proj"]])
def test_an_adapter_on_some_layers_only(tiny, monkeypatch, tmp_path, targets, load):
    monkeypatch.setenv("MMCHAT_CACHE", str(tmp_path))
    model, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32)
    model = add_adapter(model, rank=4, alpha=8, dropout=0.0, base_name="tiny", target_modules=targets)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    embeddings = torch.randn(1, 9, 64)
    decoder = load(model)
    near = decoder.prefill(embeddings, decoder.new_cache())[0]
    exact = model(inputs_embeds=embeddings).logits[0, -1]
    assert (near - exact).std() < INT8_ERROR * exact.std()


@torch.inference_mode()
@pytest.mark.parametrize("kind", [TorchDecoder, load_llama_decoder, load_openvino_decoder])
def test_caches_are_independent(adapted, kind, monkeypatch):
    """Two conversations with a common prefix, decoded in turns; both caches are copies of its first tokens."""
    monkeypatch.setenv("MMCHAT_DECODER", "openvino")  # needed by one of them
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
        assert_close(one, other, INT8_RUN_TO_RUN)  # the beginning is prefilled in other pieces


@torch.inference_mode()
def test_rows_without_the_adapter_are_as_if_there_were_none(adapted, tiny, load):
    """Beside a row with the adapter, too."""
    decoder, embeddings = load(adapted), torch.randn(1, 7, 64, generator=seeded(4))
    preset = get_preset(f"{adapted.config.model_type}-patches")
    plain = load(load_language_model(preset.language_model, torch.float32)[0])
    alone = step(plain, embeddings, [False])[0]
    found = step(decoder, embeddings, [True, False, True])
    assert_close(step(decoder, embeddings, [False])[0], alone)
    assert_close(found[1], alone, INT8_RUN_TO_RUN)
    assert_close(found[0], found[2], INT8_RUN_TO_RUN)
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


@torch.inference_mode()
def test_room_grows_with_the_answers(adapted, monkeypatch, load):
    """Long and short answers come and go, so the room is in pieces; each keeps its own keys and values."""
    monkeypatch.setattr("mmchat.inference.llama_rows.CAPACITY", 256)
    monkeypatch.setattr("mmchat.inference.paged_cache.PAGES", 4)
    decoder, rows = load(adapted), load(adapted).batch.rows
    prompts = [torch.randn(1, 60 + 40 * (index % 4), 64, generator=seeded(index)) for index in range(12)]
    caches = [decoder.new_cache() for _ in prompts]
    alone = []
    for prompt, cache in zip(prompts, caches, strict=True):
        decoder.prefill(prompt, cache)
        row = rows.add(cache)
        alone.append(dict(rows.step({row: 7}))[row].clone())
        rows.remove(row)
    handles = [rows.add(cache) for cache in caches]  # 1,440 tokens
    for index in range(0, 12, 2):
        rows.remove(handles[index])
        handles[index] = rows.add(caches[(index + 3) % 12])
    found = dict(rows.step(dict.fromkeys(handles, 7)))
    for index, row in enumerate(handles):
        expected = alone[index if index % 2 else (index + 3) % 12]
        assert (found[row] - expected).std() < INT8_ERROR * expected.std()


@torch.inference_mode()
def test_longrope_keeps_its_short_factors(tiny, tmp_path, monkeypatch, load):
    """The room for all answers together exceeds the length at which llama.cpp takes the long ones."""
    monkeypatch.setenv("MMCHAT_CACHE", str(tmp_path))
    model, _ = load_language_model(get_preset("phi3-patches").language_model, torch.float32)
    half = model.config.hidden_size // model.config.num_attention_heads // 2
    model.config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * index for index in range(half)],
        "long_factor": [9.0] * half,
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 1.0,
    }
    model = type(model)(model.config).eval()
    embeddings = torch.randn(1, 50, model.config.hidden_size, generator=seeded(0))
    exact = model(inputs_embeds=embeddings).logits[0, -1]
    decoder = load(model)
    near = decoder.prefill(embeddings, decoder.new_cache())[0]
    assert (near - exact).std() < INT8_ERROR * exact.std()


def seeded(number):
    return torch.Generator().manual_seed(number)


def test_unsupported_models_fall_back_to_pytorch(tiny, adapted, monkeypatch, caplog):
    model, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32, "4bit")
    assert load_llama_decoder(model) is None
    model, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32)
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    assert load_llama_decoder(model) is None
    monkeypatch.setenv("MMCHAT_DECODER", "torch")
    assert type(load_decoder(adapted)) is TorchDecoder
    monkeypatch.delenv("MMCHAT_DECODER")
    assert not caplog.text


@pytest.mark.parametrize(
    ("constant", "value", "reason"),
    [
        ("WHEEL", "no-such-package", "not installed"),
        ("DEFAULTS", {"n_ctx": 513}, "another interface"),
        ("CPU_FEATURES", {"avx2": "no-such-flag"}, "this processor lacks no-such-flag"),
    ],
)
def test_what_llama_cpp_lacks_is_told(adapted, monkeypatch, caplog, constant, value, reason):
    if constant == "CPU_FEATURES" and platform.machine() != "x86_64":
        pytest.skip("only x86 processors differ")
    monkeypatch.setattr(llama_cpp, constant, value)
    monkeypatch.setattr(llama_cpp, "load_library", llama_cpp.load_library.__wrapped__)
    monkeypatch.setattr(llama_decoder, "load_library", llama_cpp.load_library)
    assert type(load_decoder(adapted)) is TorchDecoder
    assert "decoding with PyTorch" in caplog.text and reason in caplog.text


def test_adapters_that_differ_in_their_scale_only(adapted, load):
    """They have converted weights of their own."""
    found = []
    for alpha in (16, 8):
        for module in adapted.modules():
            if hasattr(module, "lora_alpha"):
                module.scaling["default"] = alpha / 4
        decoder = load(adapted)
        found.append(decoder.prefill(torch.randn(1, 3, 64, generator=seeded(0)), decoder.new_cache()))
    assert (found[0] - found[1]).std() > 0.1 * found[0].std()


def test_dora_is_left_to_pytorch(tiny, tmp_path, monkeypatch, caplog, load):
    from peft import LoraConfig, get_peft_model

    monkeypatch.setenv("MMCHAT_CACHE", str(tmp_path))
    model, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, use_dora=True, target_modules="all-linear"))
    assert load(model) is None and "DoRA" in caplog.text


def test_old_converted_models_are_removed(tiny, tmp_path, monkeypatch, load):
    """Every adapter has its own; what was just loaded stays, however large."""
    monkeypatch.setenv("MMCHAT_CACHE", str(tmp_path))
    monkeypatch.setattr(llama_decoder, "CACHED_BYTES", 1)
    monkeypatch.setattr(openvino_decoder, "CACHED_BYTES", 1)
    files, logits = [], []
    for sign in (1, -1):  # models of the same shape
        model, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32)
        model.get_decoder().layers[0].mlp.up_proj.weight.data.mul_(sign)
        decoder = load(model)
        files += decoder.files.values()
        logits.append(decoder.prefill(torch.ones(1, 3, 64), decoder.new_cache()))
    assert (logits[0] - logits[1]).std() > 0.1 * logits[0].std()
    assert len(files) == 2 and not files[0].exists() and files[1].exists()


def test_the_real_model_answers_as_in_pytorch(engine, monkeypatch):
    messages, options = [Message("user", "Name the capital of France.")], SamplingOptions(0, max_new_tokens=24)
    assert isinstance(engine.decoder, LlamaDecoder)
    fast = "".join(engine.reply(messages, options))
    exact = TorchDecoder(engine.language_model)
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
