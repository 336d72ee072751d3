"""GGUF files, against llama.cpp itself: the same prompt there gives the same greedy tokens as here."""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmchat import BadInput, Message, SamplingOptions
from mmchat.bundle import bundled
from mmchat.checkpoints.gguf_export import export_gguf
from mmchat.checkpoints.weights_folder import infer_preset
from mmchat.engine import LocalEngine, load
from mmchat.models.image_encoder import load_image_encoder
from mmchat.models.language_model import switch_adapter
from mmchat.presets import PRESETS, SMOL, HubRepository, ImageEncoderPreset, Preset
from mmchat.training.data.features import embed_folder
from mmchat.training.recipe import Recipe
from mmchat.training.run import train
from tests import llava
from tests.close import certain_answer
from tests.in_process import run_script
from tests.tiny import TEXT, make_longrope, phi_3_tokenizer

QUESTIONS = ("Describe the image.", "Is there a dog?", "What is in this picture?", "Describe it.", "A dog?")


@contextmanager
def llama_server(exported, with_adapter=True, context=1024):
    """llama.cpp's own server, from the wheel xllamacpp: yields its address."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(exported.model)
    if exported.mmproj:
        params.mmproj.path = str(exported.mmproj)
        params.mmproj_use_gpu = False
    if exported.adapter and with_adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(exported.adapter), 1.0)]
    params.n_ctx, params.n_parallel, params.warmup, params.port = context, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    yield server.listening_address


def said(address, question, picture=None, count=12):
    parts = [{"type": "text", "text": question}]
    if picture is not None:
        file = io.BytesIO()
        picture.save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    body = {"messages": [{"role": "user", "content": parts if picture else question}], "temperature": 0}
    body |= {"max_tokens": count, "cache_prompt": False, "repeat_penalty": 1.0}
    return asked_of(address, "/v1/chat/completions", body)["choices"][0]["message"]["content"]


def weights_for(tiny, name: str, folder) -> tuple[Preset, Path]:
    """A preset, and weights trained for it for a few steps; the features are computed for it."""
    preset = PRESETS[name]
    features = folder / "features"
    embed_folder(tiny / "pictures", features, preset.image_encoder, load_image_encoder(preset.image_encoder))
    recipe = Recipe(train=[str(tiny / "train.json")], features=str(features), preset=name, projector="llava")
    recipe.intermediate_size, recipe.lr, recipe.max_steps, recipe.report_to = 64, 1e-2, 10, ["none"]
    recipe.quantization, recipe.out = "none", str(folder / "weights")
    train(recipe)
    return preset, folder / "weights"


def class_token_last(encoder, pixels):
    """CLIP's patches as llama.cpp computes them: it appends the class token, but numbers positions as if it led."""
    vision = encoder.network
    tower = getattr(vision, "vision_model", vision)
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [1, patches, width]
    row = torch.cat([patches, tower.embeddings.class_embedding.expand(1, 1, -1)], dim=1)
    hidden = tower.pre_layrnorm(row + tower.embeddings.position_embedding.weight)
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    return hidden[:, 1:]


@pytest.fixture(scope="module", params=["phi3-patches", "llama-patches", "phi3-siglip"])
def trained(request, tiny, tmp_path_factory) -> tuple[Preset, Path]:
    """A preset, and weights for it."""
    with pytest.MonkeyPatch.context() as patched:
        encoder = ImageEncoderPreset("tiny-siglip", HubRepository(str(tiny / "siglip")), 32, "patches", 4, 24)
        with_siglip = replace(PRESETS["phi3-patches"], name="phi3-siglip", image_encoder=encoder)
        patched.setitem(PRESETS, "phi3-siglip", with_siglip)
        yield weights_for(tiny, request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(
    ("kind", "merge", "margin"),
    [("f32", False, 1e-3), ("f32", True, 1e-3), ("f16", False, 3e-3)],  # its cache is in half precision in all three
    ids=["adapter beside", "adapter merged", "half precision"],
)
def test_the_same_greedy_answers_about_pictures(tiny, trained, tmp_path, monkeypatch, kind, merge, margin):
    """SigLIP is read exactly; CLIP as llama.cpp reads it, one patch off (its tools/mtmd/models/llava.cpp)."""
    monkeypatch.setenv("MMCHAT_DECODER", "torch")  # llama.cpp rounds weights and inputs to 8 bits
    preset, weights = trained
    exported = export_gguf(weights, tmp_path / "gguf", preset, kind, merge)
    assert bool(exported.adapter) != merge
    with llama_server(exported) as address:
        assert_same_answers(LocalEngine(preset, weights), exported, address, tiny, monkeypatch, margin)


def assert_same_answers(engine, exported, address, tiny, monkeypatch, margin):
    """Greedy answers about pictures are llama.cpp's."""
    encoder = engine.image_encoder
    assert exported.mmproj and ["position off" in note for note in exported.notes] == [True] * encoder.has_class_token
    if encoder.has_class_token:
        monkeypatch.setattr(encoder, "forward", lambda pixels: class_token_last(encoder, pixels))
    count = 12 if encoder.has_class_token else 4  # llama.cpp looks SigLIP's GELU up in half precision: it drifts off
    options = SamplingOptions(temperature=0, max_new_tokens=count, repetition_penalty=1.0)
    compared = ""
    for number, question in enumerate(QUESTIONS):
        picture = Image.open(tiny / "pictures" / f"{number}.png").convert("RGB").resize((32, 32))
        asked = [Message("user", question, [picture])]
        ours, _ = certain_answer(engine, asked, options, margin)
        theirs = said(address, question, picture, count)
        # Here an answer also ends at <|assistant|>, and an unfinished character is not shown.
        assert theirs.strip("\ufffd ").startswith(ours.strip("\ufffd "))
        compared += ours
    assert len(compared) > 2 * count


def assert_same_prompts(engine, address):
    """Conversations have llama.cpp's token ids."""
    turns = [Message("user", "Is there a dog?"), Message("assistant", "Yes."), Message("user", "Where?")]
    for messages in (turns, turns[:1], [Message("system", "Be kind."), *turns]):
        body = {"messages": [{"role": message.role, "content": message.text} for message in messages]}
        prompt = asked_of(address, "/apply-template", body)["prompt"]
        found = asked_of(address, "/tokenize", {"content": prompt, "parse_special": True})["tokens"]
        assert found == engine.tokenize(messages).token_ids


LLAVAS = {
    "phi3": {},
    "phi3, string template": {"template": llava.STRING_TEMPLATE},
    "llama, siglip, no bias": {
        "text": "llama",
        "tower": "siglip",
        "vision_feature_select_strategy": "full",
        "multimodal_projector_bias": False,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", LLAVAS.values(), ids=LLAVAS)
def test_weights_on_a_llava_model_give_the_same_prompts_and_answers(tiny, tmp_path, monkeypatch, settings):
    monkeypatch.setenv("MMCHAT_DECODER", "torch")
    base, weights = llava.make(tmp_path / "llava", tiny / "phi3", **settings), tmp_path / "weights"
    recipe = Recipe(train=[str(tiny / "train.json")], images=str(tiny / "pictures"), start_from=str(base))
    recipe.out, recipe.max_steps, recipe.report_to, recipe.lr = str(weights), 4, ["none"], 1e-2
    train(recipe)
    exported = export_gguf(weights, tmp_path / "gguf", infer_preset(weights), "f32")
    engine = load(weights=weights)
    with llama_server(exported) as address:
        assert_same_prompts(engine, address)
        assert_same_answers(engine, exported, address, tiny, monkeypatch, 1e-3)


def test_a_token_that_begins_every_text_is_in_the_prompt(tmp_path):
    """A tokenizer of Llama's kind, and a chat template that leaves this token to it, as LLaVA-1.5 has them."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = phi_3_tokenizer(TEXT)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    first = ("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    base = llava.make(tmp_path / "llava", tmp_path / "tokenizer", text="llama")
    exported = export_gguf(base, tmp_path / "gguf", infer_preset(base))
    engine = load(weights=base)
    assert engine.tokenize([Message("user", "Is it?")]).token_ids[0] == first[1]
    with llama_server(exported) as address:
        assert_same_prompts(engine, address)


def test_4_bits_by_llama_cpps_quantizer(tiny, tmp_path, monkeypatch):
    from gguf import GGUFReader

    def export(out):
        result = run_script(f"training_scripts/export_gguf.py llava --out {out} --type q4_k_m", tmp_path)
        if result.returncode:
            return result.stderr, set()
        written = GGUFReader(tmp_path / out / "model.gguf").tensors
        return result.stdout, {tensor.tensor_type.name for tensor in written}

    llava.make(tmp_path / "llava", tiny / "phi3")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    said, types = export("without")
    assert "model.gguf is q8_0, since llama.cpp's llama-quantize is not on the PATH" in said and "Q8_0" in types
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n/bin/cp "$1" "$2"\n')
    program.chmod(0o755)
    said, types = export("with")
    assert "q8_0" not in said and types == {"F16", "F32"}  # as it was handed over
    folder = tmp_path / "with"
    assert (tmp_path / "asked").read_text() == "with/model-f16.gguf with/model.gguf Q4_K_M\n"
    assert {file.name for file in folder.iterdir()} == {"model.gguf", "mmproj.gguf"}
    program.write_text("#!/bin/sh\nexit 1\n")
    assert export("failed")[0].startswith("llama-quantize could not quantize the text model. Choose --type q8_0")
    assert not list((tmp_path / "failed").iterdir())


def test_a_chat_template_that_counts_turns_is_refused(tiny, tmp_path):
    template = llava.PARTS_TEMPLATE.replace("message['role'].upper()", "message['role'] ~ loop.index")
    base = llava.make(tmp_path / "llava", tiny / "phi3", template=template)
    with pytest.raises(BadInput, match="more than put fixed texts around messages"):
        export_gguf(base, tmp_path / "gguf", infer_preset(base))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"vision_feature_layer": [-3, -1]}, "reads one layer"),
        ({"tower": "siglip"}, "keeps SigLIP's first patch"),
        ({"vision_feature_select_strategy": "full"}, "drops CLIP's class token"),
        ({"projector_hidden_act": "relu"}, "have GELU, and that of these weights has 'relu'"),
    ],
)
def test_what_llama_cpp_cannot_see_of_a_llava_model_is_named(tiny, tmp_path, settings, reason):
    """The LLaVA model itself is exported, without an adapter."""
    base = llava.make(tmp_path / "llava", tiny / "phi3", **settings)
    exported = export_gguf(base, tmp_path / "gguf", infer_preset(base))
    assert not exported.mmproj and not exported.adapter and reason in exported.notes[0]


def asked_of(address, path, body):
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_phi_3s_tokenizer_and_long_rotary_factors(tiny, tmp_path, monkeypatch):
    """The tokenizer is SentencePiece's kind, and attention is scaled, as in Phi-3.5."""
    tokenizer = phi_3_tokenizer(TEXT)
    model = make_longrope(tmp_path / "phi", tokenizer)
    base = PRESETS["phi3-patches"]
    language_model = replace(base.language_model, name="tiny-longrope", source=HubRepository(str(tmp_path / "phi")))
    monkeypatch.setitem(PRESETS, "longrope", replace(base, name="longrope", language_model=language_model))
    preset, weights = weights_for(tiny, "longrope", tmp_path)
    exported = export_gguf(weights, tmp_path / "gguf", preset, "f32")
    messages = [{"role": "user", "content": "A brown dog runs on the grass."}]
    engine = LocalEngine(preset, weights)
    assert engine.context_length == 512  # as long as the short factors hold
    ours = engine.tokenize([Message("user", messages[0]["content"])]).token_ids
    with torch.no_grad():
        expected = model(torch.tensor([ours])).logits[0, -1].log_softmax(dim=-1).topk(3)
    with llama_server(exported, with_adapter=False, context=512) as address:  # beyond, other factors hold
        prompt = asked_of(address, "/apply-template", {"messages": messages})["prompt"]
        assert asked_of(address, "/tokenize", {"content": prompt, "parse_special": True})["tokens"] == ours
        body = {"prompt": ours, "n_predict": 1, "temperature": 0, "n_probs": 3, "cache_prompt": False}
        (token,) = asked_of(address, "/completion", body)["completion_probabilities"]
    assert [top["id"] for top in token["top_logprobs"]] == expected.indices.tolist()
    assert [top["logprob"] for top in token["top_logprobs"]] == pytest.approx(expected.values.tolist(), abs=0.01)


@pytest.mark.slow
@torch.no_grad()
def test_smol_exports_its_text_side_and_adapter(engine, tmp_path):
    exported = export_gguf(bundled("weights/smol"), tmp_path, SMOL, "q8_0")
    assert exported.adapter and not exported.mmproj and "no image encoder like efficientnet" in exported.notes[0]
    question = "Name the capital of France."
    prompt = torch.tensor([engine.tokenize([Message("user", question)]).token_ids])
    answers = []
    for with_adapter in (True, False):
        switch_adapter(engine.language_model, with_adapter)
        tokens = engine.language_model.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
        answers.append(engine.tokenizer.decode(tokens, skip_special_tokens=True))
        with llama_server(exported, with_adapter) as address:
            assert said(address, question, count=20) == answers[-1]
    assert answers[0] != answers[1] and "Paris" in answers[1]  # the adapter makes it brief


def test_pooled_features_are_the_reason_for_no_mmproj(tiny, tmp_path):
    weights = tmp_path / "weights"
    recipe = Recipe(train=[str(tiny / "train.json")], features=str(tiny / "features-pooled"), preset="phi3-pooled")
    recipe.out, recipe.max_steps, recipe.report_to, recipe.quantization = str(weights), 1, ["none"], "none"
    train(recipe)
    command = "training_scripts/export_gguf.py weights --out gguf"  # the weights name their preset
    result = run_script(command, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "No mmproj.gguf" in result.stdout and "pooled embedding" in result.stdout
    assert "-m gguf/model.gguf --lora gguf/adapter.gguf" in result.stdout
    again = run_script(command, tmp_path)
    assert again.returncode == 1 and again.stderr.startswith("gguf is not empty"), again.stderr


def test_a_text_model_that_llama_cpp_names_otherwise_is_refused(tiny, tmp_path):
    preset, weights = PRESETS["phi-pooled"], tmp_path / "weights"
    recipe = Recipe(train=[str(tiny / "train.json")], features=str(tiny / "features-pooled"), preset="phi-pooled")
    recipe.out, recipe.max_steps, recipe.report_to, recipe.quantization = str(weights), 1, ["none"], "none"
    train(recipe)
    with pytest.raises(BadInput, match="'phi' cannot be exported to GGUF"):
        export_gguf(weights, tmp_path / "gguf", preset)
