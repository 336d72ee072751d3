"""OpenVINO computes what PyTorch computes, up to rounding to 8 bits, for many sequences of any length in one pass."""

from __future__ import annotations

import gc
import random
import sys
import weakref
from threading import Thread

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from mmchat import Message, SamplingOptions
from mmchat.inference import openvino_decoder, paged_cache
from mmchat.inference.decoder import TorchDecoder, load_decoder
from mmchat.inference.openvino_decoder import OpenVinoDecoder, load_openvino_decoder
from mmchat.inference.paged_cache import PAGES, PagedModel
from mmchat.inference.prefix_cache import PrefixCache
from mmchat.models.language_model import add_adapter, load_language_model
from mmchat.presets import get_preset
from tests.close import INT8_ERROR, INT8_RUN_TO_RUN, assert_close
from tests.conftest import ROOT

PHOTO = ROOT / "examples" / "ball.jpg"
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0, "partial_rotary_factor": 1.0}


@pytest.fixture(scope="module", params=["llama-patches", "phi3-patches", "phi-patches"])
def adapted(tiny, request):
    """A small model with an adapter that changes its logits."""
    model, _ = load_language_model(get_preset(request.param).language_model, torch.float32)
    model = add_adapter(model, rank=4, alpha=8, dropout=0.0, base_name="tiny")
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    return model.eval()


@pytest.fixture(autouse=True)
def asked_for(request, tmp_path, monkeypatch):
    monkeypatch.setenv("MMCHAT_DECODER", "openvino")
    if "engine" not in request.fixturenames:
        monkeypatch.setenv("MMCHAT_CACHE", str(tmp_path))


@pytest.fixture
def fast(engine, monkeypatch):
    """The engine with this decoder."""
    decoder = load_decoder(engine.decoder.model)
    assert isinstance(decoder, OpenVinoDecoder)
    monkeypatch.setattr(engine, "decoder", decoder)
    monkeypatch.setattr(engine, "prefix_cache", PrefixCache(decoder, 2e8))
    return engine


@torch.inference_mode()
@pytest.mark.parametrize("is_on", [True, False])
def test_logits_equal_the_models(adapted, is_on):
    decoder = load_openvino_decoder(adapted)
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
def test_an_adapter_on_some_layers_only(tiny, monkeypatch, tmp_path, targets):
    model, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32)
    model = add_adapter(model, rank=4, alpha=8, dropout=0.0, base_name="tiny", target_modules=targets)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    embeddings = torch.randn(1, 9, 64)
    decoder = load_openvino_decoder(model)
    near = decoder.prefill(embeddings, decoder.new_cache())[0]
    exact = model(inputs_embeds=embeddings).logits[0, -1]
    assert (near - exact).std() < INT8_ERROR * exact.std()


@torch.inference_mode()
def test_caches_are_independent(adapted):
    """Two conversations with a common prefix, decoded in turns; both caches are copies of its first tokens."""
    decoder = load_openvino_decoder(adapted)
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
def test_rows_without_the_adapter_are_as_if_there_were_none(adapted, tiny):
    """Beside a row with the adapter, too."""
    decoder, embeddings = load_openvino_decoder(adapted), torch.randn(1, 7, 64, generator=seeded(4))
    preset = get_preset(f"{adapted.config.model_type}-patches")
    plain = load_openvino_decoder(load_language_model(preset.language_model, torch.float32)[0])
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
def test_room_grows_with_the_answers(adapted, monkeypatch):
    """Long and short answers come and go, so the room is in pieces; each keeps its own keys and values."""
    monkeypatch.setattr(paged_cache, "PAGES", 4)
    decoder, rows = load_openvino_decoder(adapted), load_openvino_decoder(adapted).batch.rows
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
def test_longrope_keeps_its_short_factors(tiny, tmp_path, monkeypatch):
    """The room for all answers together exceeds the length at which the model takes the long ones."""
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
    decoder = load_openvino_decoder(model)
    near = decoder.prefill(embeddings, decoder.new_cache())[0]
    assert (near - exact).std() < INT8_ERROR * exact.std()


@torch.inference_mode()
@pytest.mark.parametrize(
    "changed",
    [
        {"sliding_window": 16},
        {
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "partial_rotary_factor": 1.0,
            }
        },
    ],
    ids=["sliding window", "linear scaling"],
)
def test_settings_of_attention(tiny, tmp_path, monkeypatch, changed):
    """Tokens see the latest 16 only, whether they are prefilled or written; positions are scaled."""
    model, _ = load_language_model(get_preset("phi3-patches").language_model, torch.float32)
    embeddings = torch.randn(1, 50, model.config.hidden_size, generator=seeded(0))
    plain = model(inputs_embeds=embeddings).logits[0, -1]
    for name, value in changed.items():
        setattr(model.config, name, value)
    state = model.state_dict()
    model = type(model)(model.config).eval()
    model.load_state_dict(state)
    exact = model(inputs_embeds=embeddings).logits[0, -1]
    decoder = load_openvino_decoder(model)
    cache = decoder.new_cache()
    for part in embeddings.split([40, 9, 1], dim=1):
        near = decoder.prefill(part, cache)[0]
    assert (near - exact).std() < INT8_ERROR * exact.std() < (near - plain).std()


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["Qwen2", "Mistral"])
def test_other_models(tmp_path, monkeypatch, kind):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 99}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**sizes, **heads)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()  # Qwen2's queries, keys and values have one
    embeddings = torch.randn(1, 40, 64)
    decoder = load_openvino_decoder(model)
    near = decoder.prefill(embeddings, decoder.new_cache())[0]
    exact = model(inputs_embeds=embeddings).logits[0, -1]
    assert (near - exact).std() < INT8_ERROR * exact.std()


def seeded(number):
    return torch.Generator().manual_seed(number)


def test_what_it_cannot_compute_is_left_to_others(tiny, adapted, monkeypatch, caplog):
    model, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32, "4bit")
    assert load_openvino_decoder(model) is None
    model, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32)
    model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    assert load_openvino_decoder(model) is None and not caplog.text
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert type(load_decoder(adapted)) is not OpenVinoDecoder
    assert "OpenVINO cannot run this model" in caplog.text
    monkeypatch.delenv("MMCHAT_DECODER")
    assert load_openvino_decoder(adapted) is None  # only where it is asked for


@torch.inference_mode()
def test_a_processor_without_8_bit_products(adapted, monkeypatch):
    """OpenVINO fails in the first pass there; inputs are not rounded then, so the logits are closer."""
    infer, groups = paged_cache.PagedModel._tested, []

    def fail(model, compiled):
        groups.append(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE"))
        if len(groups) == 1:
            raise RuntimeError("could not create a primitive")
        return infer(model, compiled)

    monkeypatch.setattr(paged_cache.PagedModel, "_tested", fail)
    embeddings = torch.randn(1, 9, 64, generator=seeded(0))
    decoder = load_openvino_decoder(adapted)
    near = decoder.prefill(embeddings, decoder.new_cache())[0]
    exact = adapted(inputs_embeds=embeddings).logits[0, -1]
    assert groups[1] == 0 and (near - exact).std() < INT8_ERROR * exact.std()


def test_adapters_that_differ_in_their_scale_only(adapted):
    """They have converted weights of their own."""
    found = []
    for alpha in (16, 8):
        for module in adapted.modules():
            if hasattr(module, "lora_alpha"):
                module.scaling["default"] = alpha / 4
        decoder = load_openvino_decoder(adapted)
        found.append(decoder.prefill(torch.randn(1, 3, 64, generator=seeded(0)), decoder.new_cache()))
    assert (found[0] - found[1]).std() > 0.1 * found[0].std()


def test_dora_is_left_to_pytorch(tiny, tmp_path, monkeypatch, caplog):
    from peft import LoraConfig, get_peft_model

    model, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, use_dora=True, target_modules="all-linear"))
    assert load_openvino_decoder(model) is None and "DoRA" in caplog.text


def test_old_converted_models_are_removed(tiny, tmp_path, monkeypatch):
    """Every adapter has its own; what was just loaded stays, however large."""
    monkeypatch.setenv("MMCHAT_CACHE", str(tmp_path))
    monkeypatch.setattr(openvino_decoder, "CACHED_BYTES", 1)
    files, logits = [], []
    for sign in (1, -1):  # models of the same shape
        model, _ = load_language_model(get_preset("llama-patches").language_model, torch.float32)
        model.get_decoder().layers[0].mlp.up_proj.weight.data.mul_(sign)
        decoder = load_openvino_decoder(model)
        files += decoder.files.values()
        logits.append(decoder.prefill(torch.ones(1, 3, 64), decoder.new_cache()))
    assert (logits[0] - logits[1]).std() > 0.1 * logits[0].std()
    assert len(files) == 2 and not files[0].exists() and files[1].exists()


def test_the_real_model_answers_as_in_pytorch(fast, monkeypatch):
    messages, options = [Message("user", "Name the capital of France.")], SamplingOptions(0, max_new_tokens=24)
    said = "".join(fast.reply(messages, options))
    exact = TorchDecoder(fast.language_model)
    monkeypatch.setattr(fast, "decoder", exact)
    monkeypatch.setattr(fast, "prefix_cache", PrefixCache(exact, 0))
    assert "".join(fast.reply(messages, options)) == said == "The capital of France is Paris."


def test_an_answer_does_not_depend_on_the_prefix_cache(fast):
    options = SamplingOptions(temperature=0, max_new_tokens=12)
    first = [Message("user", "What color is the ball?", images=[PHOTO])]
    said = "".join(fast.reply(first, options))
    second = [*first, Message("assistant", said), Message("user", "Is there a dog?")]
    cached = "".join(fast.reply(second, options))
    fast.forget()
    assert "".join(fast.reply(second, options)) == cached


@torch.inference_mode()
def test_rows_have_the_logits_of_alone(adapted):
    """Rows of other lengths, with and without the adapter, join and leave. Their tokens are given, not sampled."""
    decoder = load_openvino_decoder(adapted)
    rng, hidden = random.Random(1), decoder.model.config.hidden_size
    torch.manual_seed(2)
    prompts = [torch.randn(1, 1 + 37 * index % 50, hidden) for index in range(9)]
    tokens = [[rng.randrange(4, 200) for _ in range(1 + 7 * index % 20)] for index in range(9)]

    def prefilled(index, decoder=decoder, prompts=prompts):
        cache = decoder.new_cache(with_adapter=index % 2 == 0)
        decoder.prefill(prompts[index], cache)
        return cache

    alone = []
    for index, given in enumerate(tokens):
        row = decoder.batch.rows.add(prefilled(index))
        alone.append([dict(decoder.batch.rows.step({row: token_id}))[row].clone() for token_id in given])
        decoder.batch.rows.remove(row)
    waiting, running, found = list(range(9)), {}, [[] for _ in range(9)]
    while waiting or running:
        if waiting and (not running or rng.random() < 0.5):
            index = waiting.pop(0)
            running[index] = decoder.batch.rows.add(prefilled(index))
        stepped = rng.sample(list(running), rng.randint(1, len(running)))
        numbers = {running[index]: index for index in stepped}
        logits = decoder.batch.rows.step({running[index]: tokens[index][len(found[index])] for index in stepped})
        for row, values in logits:
            found[numbers[row]].append(values.clone())
        for index in stepped:
            if len(found[index]) == len(tokens[index]):
                decoder.batch.rows.remove(running.pop(index))
    assert list(map(len, found)) == list(map(len, tokens))
    for one, other in zip(found, alone, strict=True):
        one, other = torch.stack(one), torch.stack(other)
        assert (one - other).std() < INT8_ERROR * other.std()


@torch.inference_mode()
def test_reordered_rows_go_on_as_the_rows_that_they_copy(adapted):
    decoder = load_openvino_decoder(adapted)
    rows, caches = decoder.batch.rows, []
    for length in (5, 9):
        caches.append(decoder.new_cache())
        decoder.prefill(torch.randn(1, length, decoder.model.config.hidden_size), caches[-1])

    def stepped(cache, *token_ids, rows=rows):
        """Logits after the tokens, in a row of its own."""
        row = rows.add(cache)
        *_, logits = [dict(rows.step({row: token_id}))[row].clone() for token_id in token_ids]
        rows.remove(row)
        return logits

    expected = [stepped(caches[0], token_id, 8) for token_id in (7, 7, 5)] + [stepped(caches[1], 9, 10)]
    bystander, beams = rows.add(caches[1]), [rows.add(caches[0]) for _ in range(3)]
    list(rows.step({**dict(zip(beams, (5, 6, 7), strict=True)), bystander: 9}))
    rows.reorder(beams, [2, 2, 0])
    found = dict(rows.step({**dict.fromkeys(beams, 8), bystander: 10}))
    for row, logits in zip([*beams, bystander], expected, strict=True):
        assert (found[row] - logits).std() < INT8_ERROR * logits.std()
        rows.remove(row)


@torch.inference_mode()
def test_rows_with_the_same_weights_share_a_pass_and_their_beginning(adapted, monkeypatch):
    """A crowd that continues one long prompt takes little more room than one answer, and gives it back."""
    decoder, sizes, extend = load_openvino_decoder(adapted), [], PagedModel.extend
    rows, cache = decoder.batch.rows, decoder.new_cache()
    decoder.prefill(torch.randn(1, 400, decoder.model.config.hidden_size), cache)
    plain = decoder.new_cache(with_adapter=False)
    decoder.prefill(torch.randn(1, 5, decoder.model.config.hidden_size), plain)
    monkeypatch.setattr(PagedModel, "extend", lambda self, *given: sizes.append(len(given[0])) or extend(self, *given))
    crowd = [rows.add(cache) for _ in range(3 * PAGES)] + [rows.add(plain)]
    assert len(rows.step(dict.fromkeys(crowd, 5))) == len(crowd)
    assert sorted(sizes) == [1, 3 * PAGES]
    pages = {page for row in crowd[:-1] for page in row.pages}
    assert len(pages) == 12 + 3 * PAGES  # 384 tokens in full pages, and one page for each
    held = weakref.ref(next(iter(pages)))
    for row in crowd:
        rows.remove(row)
    del pages
    assert held() is None or held() in cache.pages


@torch.inference_mode()
def test_a_pass_that_fails_changes_nothing(adapted, monkeypatch):
    def fail(self, request, embeddings, past, pages):
        logits = infer(self, request, embeddings, past, pages)
        if 9 in past:
            raise MemoryError("too little")
        return logits

    decoder, infer = load_openvino_decoder(adapted), PagedModel._infer
    rows, handles = decoder.batch.rows, []
    for length in (5, 9, 6):
        decoder.prefill(torch.randn(1, length, decoder.model.config.hidden_size), cache := decoder.new_cache())
        handles.append(rows.add(cache))
    with monkeypatch.context() as patched, pytest.raises(MemoryError, match="too little"):
        patched.setattr(PagedModel, "_infer", fail)
        rows.step(dict.fromkeys(handles, 5))
    assert [row.length for row in handles] == [5, 9, 6]
    rows.remove(handles[1])
    assert len(rows.step(dict.fromkeys(handles[::2], 5))) == 2


def test_garbage_collection_may_close_an_answer_during_a_pass(fast, monkeypatch):
    class Abandoned:
        """An answer in a reference cycle: only garbage collection closes it."""

        def __init__(self):
            self.pieces, self.itself = fast.reply([Message("user", "Write a story.")], options), self
            next(self.pieces)

    def extend(self, *given):
        gc.collect()  # as any allocation may do
        return compute(self, *given)

    def run():
        streams = [fast.reply([Message("user", f"Write {number} poems.")], options) for number in (3, 4, 5, 6)]
        for _ in zip(*streams, strict=False):
            Abandoned()
        done.append(True)

    options, compute, done = SamplingOptions(temperature=0, max_new_tokens=6), PagedModel.extend, []
    monkeypatch.setattr(PagedModel, "extend", extend)
    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert done
