"""LLaVA models as weights: the same numbers and the same words as transformers' LlavaForConditionalGeneration."""

from __future__ import annotations

import json
from contextlib import chdir

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmchat import BadInput, Message, SamplingOptions
from mmchat.checkpoints.weights_folder import infer_preset, load_model
from mmchat.engine import LocalEngine, load
from mmchat.errors import WeightsError
from mmchat.models.prompt import tokenize_conversation
from mmchat.training.recipe import Recipe
from mmchat.training.run import train
from tests import llava
from tests.close import assert_close, assert_same_choices, recorded_logits
from tests.in_process import run_script

KINDS = {
    "phi3": {"text": "phi3"},
    "phi3, string template": {"text": "phi3", "template": llava.STRING_TEMPLATE},
    "llama, class token": {"text": "llama", "vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    "mistral, siglip": {"text": "mistral", "tower": "siglip", "vision_feature_select_strategy": "full"},
    "qwen2, siglip, first patch dropped": {"text": "qwen2", "tower": "siglip", "projector_hidden_act": "relu"},
    "llama, two layers, no bias": {
        "text": "llama",
        "vision_feature_layer": [-3, -1],
        "multimodal_projector_bias": False,
    },
}


@pytest.fixture(scope="module")
def pictures(tiny):
    return [Image.open(tiny / "pictures" / f"{number}.png").convert("RGB") for number in range(3)]


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def folder(request, tiny, tmp_path_factory):
    return llava.make(tmp_path_factory.mktemp("models") / "llava", tiny / "phi3", **request.param)


@pytest.fixture(scope="module")
def reference(folder):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder, backend="pil")


def conversation(pictures):
    """Two turns about two pictures, and a third about another one."""
    return [
        Message("user", "What is in these pictures?", pictures[:2]),
        Message("assistant", "A brown dog."),
        Message("user", "Is there a dog?", pictures[2:]),
    ]


def inputs_of(processor, messages):
    """The model's inputs, as transformers' processor makes them."""
    shown = [picture for message in messages for picture in message.images]
    template = processor.chat_template
    if template == llava.STRING_TEMPLATE:
        turns = [{"role": m.role, "content": "<image>\n" * len(m.images) + m.text} for m in messages]
    else:
        turns = [
            {"role": m.role, "content": [{"type": "image"}] * len(m.images) + [{"type": "text", "text": m.text}]}
            for m in messages
        ]
    text = processor.tokenizer.apply_chat_template(
        turns, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    has_bos = text.startswith(processor.tokenizer.bos_token)
    return processor(images=shown or None, text=text, return_tensors="pt", add_special_tokens=not has_bos)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3], ids=["one turn", "two turns"])
def test_equal_logits_and_equal_tokens(folder, reference, pictures, count, monkeypatch):
    monkeypatch.setenv("MMCHAT_DECODER", "torch")  # llama.cpp rounds weights and inputs to 8 bits
    model, processor = reference
    messages = conversation(pictures)[:count]
    engine = load(weights=folder)
    assert engine.about and isinstance(engine, LocalEngine)
    inputs = inputs_of(processor, messages)
    encoded = engine.tokenize(messages)
    image_id = model.config.image_token_id
    theirs = [-200 if token == image_id else token for token in inputs["input_ids"][0].tolist()]
    assert encoded.token_ids == theirs
    ours = engine.language_model(inputs_embeds=engine.embed(encoded)).logits
    assert_close(ours, model(**inputs).logits, 1e-4)
    stops = engine.language_model.generation_config.eos_token_id
    options = {"do_sample": False, "eos_token_id": stops, "pad_token_id": 1}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    written = model.generate(**inputs, max_new_tokens=12, **options)
    with recorded_logits() as logits:
        list(engine.reply(messages, SamplingOptions(temperature=0, max_new_tokens=12)))
    assert_same_choices(logits, [row[0] for row in written.logits], 1e-4)


def test_questions_without_a_picture_are_asked_in_the_template_too(folder, reference):
    engine, (_, processor) = load(weights=folder), reference
    asked = [Message("user", "Is there a dog?")]
    assert engine.tokenize(asked).token_ids == inputs_of(processor, asked)["input_ids"][0].tolist()


def test_nothing_typed_is_a_picture_or_a_turn(folder, pictures):
    engine = load(weights=folder)
    special = engine.tokenizer.convert_tokens_to_ids(["<|end|>", "<|user|>"])
    plain = engine.tokenize([Message("user", "Is it?", pictures[:1])]).token_ids
    typed = engine.tokenize([Message("user", "<image> <|end|> <|user|>", pictures[:1])]).token_ids
    for token in (-200, *special):
        assert typed.count(token) == plain.count(token)


def test_no_other_part_is_in_the_language_models_memory(folder):
    preset = infer_preset(folder)
    assert not preset.language_model.languages  # nothing in its files names them
    model, _ = load_model(preset, folder, torch.float32)
    assert not [name for name, _ in model.named_parameters() if "vision" in name]
    assert sum(weight.numel() for weight in model.language_model.parameters()) == preset.language_model.parameters


BROKEN = {
    "text model": ({"text_config": {"model_type": "gpt2"}}, "text model of the type 'gpt2'"),
    "image encoder": ({"vision_config": {"model_type": "dinov2"}}, "image encoder of the type 'dinov2'"),
    "activation": ({"projector_hidden_act": "maxout"}, "activation 'maxout'"),
    "layer": ({"vision_feature_layer": -9}, "there is no layer -9"),
    "projector without bias": ({"multimodal_projector_bias": False}, "not two linear layers"),
}


@pytest.fixture
def broken(tiny, tmp_path):
    """A folder in several files, to damage."""
    return llava.make(tmp_path / "broken", tiny / "phi3", max_shard_size="60KB")


@pytest.mark.parametrize(("change", "sentence"), BROKEN.values(), ids=BROKEN)
def test_a_config_of_something_else_gets_one_sentence(broken, change, sentence):
    config = json.loads((broken / "config.json").read_text())
    for name, value in change.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=sentence):
        load(weights=broken)


def test_missing_or_damaged_files_get_one_sentence(broken, tmp_path):
    shards = sorted(broken.glob("model-*.safetensors"))
    assert len(shards) > 3
    load(weights=broken)  # in several files
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match="damaged"):
        load(weights=broken)
    shards[1].unlink()
    with pytest.raises(WeightsError, match=f"lacks {shards[1].name}"):
        load(weights=broken)
    index = broken / "model.safetensors.index.json"
    index.write_text("{")
    with pytest.raises(WeightsError, match="index.json of 'broken' is damaged"):
        load(weights=broken)
    (broken / "chat_template.jinja").unlink()
    with pytest.raises(WeightsError, match="no chat template"):
        load(weights=broken)


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
def test_a_missing_or_damaged_tokenizer_or_processor_is_named(broken, name):
    def use():
        return load(weights=broken).image_encoder

    for trouble, change in (("damaged", lambda: (broken / name).write_text("{")), ("missing", (broken / name).unlink)):
        change()
        with pytest.raises(WeightsError, match=f"{name} of 'broken' is {trouble}"):
            use()


def test_a_missing_tensor_gets_one_sentence(broken, tiny):
    index = broken / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(
        name
        for name in content["weight_map"]
        if name.endswith("layers.1.self_attn.o_proj.weight") and "language" in name
    )
    shard = broken / content["weight_map"][name]
    save_file({key: value for key, value in load_file(shard).items() if key != name}, shard, {"format": "pt"})
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="language model of 'broken' lacks 1 tensor that"):
        load(weights=broken)


def test_files_named_as_older_transformers_wrote_them_are_read(tiny, tmp_path, pictures):
    """xtuner/llava-phi-3-mini-hf has these names: ``vision_tower.vision_model.…``."""
    folder = llava.make(tmp_path / "old", tiny / "phi3")
    asked, options = [Message("user", "What is it?", pictures[:1])], SamplingOptions(temperature=0, max_new_tokens=8)
    expected = "".join(load(weights=folder).reply(asked, options))
    file = folder / "model.safetensors"
    state = load_file(file)
    old = {key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in state.items()}
    new = {
        key.replace("language_model.lm_head", "lm_head").replace("language_model.model", "model.language_model"): value
        for key, value in state.items()
    }
    new = {key if key.startswith(("model.", "lm_head")) else f"model.{key}": value for key, value in new.items()}
    for names in (old, new):
        assert names.keys() != state.keys()
        save_file(names, file, {"format": "pt"})
        assert "".join(load(weights=folder).reply(asked, options)) == expected


NO_WEIGHTS = {  # what a folder holds -> what is said of it
    "nothing": ({}, "'it' is not a weights folder: it is empty"),
    "something else": ({"notes.txt": ""}, "neither mmchat.json, which training writes, nor the config.json of a LLaVA"),
    "a damaged config": ({"config.json": "{"}, "config.json of 'it' is damaged"),
    "a config without a model": ({"config.json": "[]"}, "config.json of 'it' is damaged"),
    "damaged weights": ({"mmchat.json": "{"}, "mmchat.json of 'it' is damaged"),
    "weights without settings": ({"mmchat.json": "[]"}, "mmchat.json of 'it' is damaged"),
    "another LLaVA": ({"config.json": '{"model_type": "llava_next"}'}, "'it' is a model of the type 'llava_next'"),
    "a text model": ({"config.json": '{"model_type": "llama"}'}, "'it' is a text model .'llama'., which cannot see"),
}


@pytest.mark.parametrize(("files", "sentence"), NO_WEIGHTS.values(), ids=NO_WEIGHTS)
def test_what_is_no_weights_folder_is_told_what_it_is(tmp_path, monkeypatch, files, sentence):
    (tmp_path / "it").mkdir()
    for name, content in files.items():
        (tmp_path / "it" / name).write_text(content)
    monkeypatch.chdir(tmp_path / "it")
    for weights in (tmp_path / "it", "."):
        with pytest.raises(WeightsError, match=sentence):
            load(weights=weights)


def test_a_name_that_is_nowhere_gets_one_sentence(tmp_path):
    with pytest.raises(WeightsError, match="There is no folder 'runs/mine' here"):
        load(weights="runs/mine")
    for name in ("/nowhere/mine", "./mine", "../mine"):
        with pytest.raises(WeightsError, match="^There is no folder 'mine'"):
            load(weights=name)
    (tmp_path / "mmchat.json").touch()
    with pytest.raises(WeightsError, match="'mmchat.json' is a file"):
        load(weights=tmp_path / "mmchat.json")


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A LLaVA model, and an adapter trained on it with its projector in 4 bits."""
    out = tmp_path_factory.mktemp("run")
    base = llava.make(out / "llava", tiny / "phi3")
    recipe = Recipe(
        train=[str(tiny / "train.json")],
        images=str(tiny / "pictures"),
        start_from="llava",
        quantization="4bit",
        out=str(out / "run"),
        max_steps=6,
        lr=1e-2,
        report_to=["none"],
    )
    with chdir(out):
        train(recipe)
    return base, out / "run"


def test_an_adapter_on_top_chats_and_is_off_for_rewriting(tiny, trained, pictures):
    base, folder = trained
    assert json.loads((folder / "mmchat.json").read_text())["llava"]["name"] == str(base)
    ours, plain = load(weights=folder), load(weights=base)
    options = SamplingOptions(temperature=0, max_new_tokens=8, repetition_penalty=1.0)
    asked = [Message("user", "Describe the image.", pictures[:1])]
    assert "".join(ours.reply(asked, options)) != "".join(plain.reply(asked, options))
    for rewritten in ("dog yes", "a dog"):
        assert "".join(ours.rewrite("Is it?", rewritten, options)) == "".join(
            plain.rewrite("Is it?", rewritten, options)
        )


def test_another_preset_is_refused(trained):
    for weights in trained:
        for preset in ("smol", "llava-phi-3"):
            with pytest.raises(WeightsError, match=f"LLaVA model 'llava', which the preset '{preset}' does not have"):
                load(preset, weights)


def test_a_llava_folder_that_moved_away_is_named(trained, tmp_path):
    config = json.loads((trained[1] / "mmchat.json").read_text())
    for path in (str(tmp_path / "moved"), "./moved", "moved"):
        config["llava"]["name"] = path
        (tmp_path / "mmchat.json").write_text(json.dumps(config))
        with pytest.raises(WeightsError, match="the model in 'moved', a folder that is no longer where it was"):
            load(weights=tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["phi3", "phi3, string template", "qwen2, siglip, first patch dropped"])
def test_an_adapter_on_top_is_exported_with_its_llava_model(tiny, tmp_path, pictures, caplog, kind):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    base = llava.make(tmp_path / "llava", tiny / "phi3", **KINDS[kind])
    recipe = Recipe(
        train=[str(tiny / "train.json")],
        images=str(tiny / "pictures"),
        start_from=str(base),
        out=str(tmp_path / "run"),
        max_steps=4,
        lr=1e-2,
        report_to=["none"],
    )
    with torch.enable_grad(), caplog.at_level("INFO"):
        train(recipe)
    assert "Training on the LLaVA model llava with its own image encoder" in caplog.messages
    command = "training_scripts/export_llava.py run --out exported --dtype float32"
    result = run_script(command, tmp_path)
    assert result.returncode == 0, result.stderr
    again = run_script(command, tmp_path)
    assert again.returncode == 1 and again.stderr.startswith("exported is not empty"), again.stderr
    engine, messages = load(weights=tmp_path / "run"), conversation(pictures)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()
    inputs = inputs_of(AutoProcessor.from_pretrained(tmp_path / "exported", backend="pil"), messages)
    ours = engine.language_model(inputs_embeds=engine.embed(engine.tokenize(messages))).logits
    assert_close(ours, model(**inputs).logits, 1e-4)
    plain = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
    assert (ours - plain(**inputs).logits).abs().max() > 0.01  # the adapter is in it


def test_what_was_trained_are_the_answers_and_where_they_end(tiny, trained):
    engine = load(weights=trained[0])
    turns = [Message("user", "Is there a dog?", ["a"]), Message("assistant", "Yes."), Message("user", "Where?")]
    encoded = tokenize_conversation(
        [*turns, Message("assistant", "On grass.")], engine.tokenizer, engine.chat_format, 4
    )
    learned = [token for token, learns in zip(encoded.token_ids, encoded.is_answer, strict=True) if learns]
    assert engine.tokenizer.decode(learned).replace(" ", "") == "Yes.Ongrass.<|im_end|>"
    open_ = tokenize_conversation(turns, engine.tokenizer, engine.chat_format, 4, add_generation_prompt=True)
    assert encoded.token_ids[: len(open_.token_ids)] == open_.token_ids


@pytest.mark.parametrize("quantization", ["8bit", "4bit", "4bit-double"])
def test_quantized(trained, pictures, quantization):
    for weights in trained:
        engine = load(weights=weights, quantization=quantization)
        asked = [Message("user", "Describe the image.", pictures[:1])]
        "".join(engine.reply(asked, SamplingOptions(temperature=0, max_new_tokens=4)))
        kinds = {type(weight).__name__ for weight in engine.language_model.parameters()}
        assert kinds & {"Params4bit", "Int8Params"} and engine.quantization.kind == quantization


def test_evaluating(tiny, trained, tmp_path):
    for weights in trained:
        command = f"training_scripts/evaluate.py --weights {weights} --images {tiny / 'pictures'}"
        result = run_script(f"{command} --questions {tiny / 'eval.json'} --conditions real --out out.json", tmp_path)
        assert result.returncode == 0, result.stderr
        (entry,) = json.loads((tmp_path / "out.json").read_text())
        assert entry["answers"]
    refused = run_script(f"{command} --questions {tiny / 'eval.json'} --preset smol", tmp_path)
    assert refused.returncode == 1 and "leave the preset out" in refused.stderr, refused.stderr


def test_names_need_a_text_encoder(trained, pictures):
    with pytest.raises(BadInput, match="needs CLIP with its text encoder"):
        load(weights=trained[0]).classes(pictures[0], ["dog"])
