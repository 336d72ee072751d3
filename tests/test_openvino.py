"""What only the decoder on OpenVINO has; test_decoder.py and test_batch.py test what all decoders do."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from threading import Thread

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from mmchat import Message, SamplingOptions
from mmchat.inference import paged_cache
from mmchat.inference.decoder import TorchDecoder, load_decoder
from mmchat.inference.openvino_decoder import OpenVinoDecoder, load_openvino_decoder
from mmchat.inference.paged_cache import PAGES, PagedModel
from mmchat.inference.prefix_cache import PrefixCache
from mmchat.models.language_model import load_language_model
from mmchat.presets import get_preset
from tests.close import INT8_ERROR
from tests.conftest import ROOT
from tests.tiny import adapted_model

PHOTO = ROOT / "examples" / "ball.jpg"
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0, "partial_rotary_factor": 1.0}


@pytest.fixture(scope="module", params=["llama-patches", "phi3-patches", "phi-patches"])
def adapted(tiny, request):
    return adapted_model(request.param)


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
@pytest.mark.parametrize(
    "changed",
    [
        {"sliding_window": 16},
        {"rope_parameters": LINEAR},
    ],
    ids=["sliding window", "linear scaling"],
)
def test_settings_of_attention(tiny, changed):
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
def test_other_models(kind):
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


SIGNALED = """
import gc, os, signal, sys
from pathlib import Path
import torch
from mmchat.inference.openvino_decoder import load_openvino_decoder
from mmchat.models.language_model import load_language_model
from tests import tiny

preset = tiny.presets(Path(sys.argv[1]))["llama-patches"]
model, _ = load_language_model(preset.language_model, torch.float32)
decoders = [load_openvino_decoder(model) for _ in range(2)]
for decoder in decoders:
    decoder.prefill(torch.randn(1, 3, model.config.hidden_size), decoder.new_cache())
del decoder
while decoders:
    del decoders[0]
    gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("A signal came."))
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.skipif(os.name == "nt", reason="has no such signals")
def test_signals_are_received_after_models_were_freed(tiny, tmp_path):
    """Where the processor has AMX, OpenVINO gives the thread another stack for signals and frees it at some point."""
    settings = {"MALLOC_MMAP_THRESHOLD_": "4096", "MMCHAT_CACHE": str(tmp_path)}  # what is freed is unmapped at once
    run = subprocess.run(
        [sys.executable, "-c", SIGNALED, str(tiny)],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stdout) == (0, "A signal came.\n"), run.stderr
