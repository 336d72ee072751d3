"""An exported LLaVA folder says what mmchat says, token for token."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mmchat import BadInput, Message, SamplingOptions
from mmchat.checkpoints.llava_export import chat_template, export_llava
from mmchat.checkpoints.weights_folder import load_model
from mmchat.engine import LocalEngine
from mmchat.models.chat_formats import CHAT_FORMATS
from mmchat.models.language_model import load_language_model
from mmchat.models.prompt import IMAGE_TOKEN_ID, tokenize_conversation
from mmchat.presets import PRESETS, HubRepository
from mmchat.training.recipe import Recipe
from mmchat.training.run import train
from tests.close import assert_close, assert_same_choices, recorded_logits
from tests.tiny import make_longrope

QUESTION = "Describe the image."
WITH_LOGITS = {"return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module", params=["phi3-patches", "llama-patches"])
def exported(request, tiny, tmp_path_factory):
    """A preset, weights trained for it, and the folder they were exported to."""
    folder = tmp_path_factory.mktemp("exported")
    train(
        Recipe(
            train=[str(tiny / "train.json")],
            features=str(tiny / "features-patches"),
            preset=request.param,
            projector="llava",
            intermediate_size=64,
            quantization="4bit",
            out=str(folder / "weights"),
            max_steps=20,
            lr=1e-2,
            report_to=["none"],
        )
    )
    preset = PRESETS[request.param]
    export_llava(folder / "weights", folder / "llava", preset, torch.float32)
    return preset, folder / "weights", folder / "llava"


def asked(picture):
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]}]


def test_the_same_greedy_tokens(tiny, exported, monkeypatch):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    monkeypatch.setenv("MMCHAT_DECODER", "torch")  # llama.cpp rounds weights and inputs to 8 bits
    preset, weights, folder = exported
    engine = LocalEngine(preset, weights)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    for number in range(3):
        picture = Image.open(tiny / "pictures" / f"{number}.png").convert("RGB")
        inputs = processor.apply_chat_template(
            asked(picture), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ours = tokenize_conversation(
            [Message("user", QUESTION, [picture])], engine.tokenizer, engine.chat_format, 4, add_generation_prompt=True
        ).token_ids
        image_id = model.config.image_token_id
        assert [IMAGE_TOKEN_ID if token == image_id else token for token in inputs["input_ids"][0].tolist()] == ours
        written = model.generate(**inputs, max_new_tokens=12, do_sample=False, **WITH_LOGITS)
        options = SamplingOptions(temperature=0, max_new_tokens=12)
        with recorded_logits() as logits:
            assert "".join(engine.reply([Message("user", QUESTION, [picture])], options))
        known = len(logits[0])  # the export has a token for pictures, too
        assert_same_choices(logits, [row[0, :known] for row in written.logits], 1e-4)  # the adapter is merged there


@torch.no_grad()
def test_merging_changes_logits_by_rounding_only(tiny, exported):
    from transformers import AutoModelForImageTextToText

    preset, weights, folder = exported
    ours, _ = load_model(preset, weights, torch.float32)
    merged = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).model.language_model
    embeddings = torch.randn(2, 9, 64)
    expected = ours.unwrapped_language_model.get_decoder()(inputs_embeds=embeddings).last_hidden_state
    assert_close(merged(inputs_embeds=embeddings).last_hidden_state, expected)


VLLM_LAYER = (
    "layer_norm1 layer_norm2 mlp.fc1 mlp.fc2 self_attn.k_proj self_attn.out_proj self_attn.q_proj self_attn.v_proj"
)
VLLM_TOWER = "vision_tower.vision_model."
VLLM_CLIP = "pre_layrnorm.weight pre_layrnorm.bias embeddings.class_embedding"
VLLM_SIGLIP = (
    "embeddings.patch_embedding.bias head.probe head.attention.in_proj_weight head.attention.in_proj_bias "
    "head.attention.out_proj.weight head.attention.out_proj.bias head.layernorm.weight head.layernorm.bias "
    "head.mlp.fc1.weight head.mlp.fc1.bias head.mlp.fc2.weight head.mlp.fc2.bias"
)


def assert_names_of_vllm(folder, preset, of_tower):
    """The parameters of vLLM's llava.py, clip.py and siglip.py; its language models load the names of transformers."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    modules = {f"{VLLM_TOWER}encoder.layers.{layer}.{name}" for layer in range(3) for name in VLLM_LAYER.split()}
    modules |= {f"{VLLM_TOWER}post_layernorm", "multi_modal_projector.linear_1", "multi_modal_projector.linear_2"}
    expected = {f"{module}.{part}" for module in modules for part in ("weight", "bias")}
    both = ["embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"]
    expected |= {f"{VLLM_TOWER}{name}" for name in [*both, *of_tower.split()]}
    base, _ = load_language_model(preset.language_model, torch.float32)
    assert not base.config.tie_word_embeddings  # there, no output layer is stored
    assert names == expected | {f"language_model.{name}" for name in base.state_dict()}


def test_tensor_names_are_those_of_vllm(exported):
    preset, _, folder = exported
    assert_names_of_vllm(folder, preset, VLLM_CLIP)


def test_no_file_names_a_folder_of_this_machine(tiny, exported):
    _, weights, folder = exported
    for file in (*folder.glob("*.json"), *folder.glob("*.jinja")):
        content = file.read_text(encoding="utf-8")
        assert "_name_or_path" not in content and str(tiny) not in content and str(weights.parent) not in content, file


@torch.no_grad()
def test_longrope_stays_below_its_long_factors(tiny, tmp_path, monkeypatch):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    make_longrope(tmp_path / "phi", AutoTokenizer.from_pretrained(tiny / "phi3"))
    base = PRESETS["phi3-patches"]
    language_model = replace(base.language_model, name="tiny-longrope", source=HubRepository(str(tmp_path / "phi")))
    preset = replace(base, name="longrope", language_model=language_model)
    monkeypatch.setitem(PRESETS, "longrope", preset)
    recipe = Recipe(train=[str(tiny / "train.json")], features=str(tiny / "features-patches"), preset="longrope")
    recipe.projector, recipe.intermediate_size, recipe.max_steps, recipe.report_to = "llava", 64, 1, ["none"]
    recipe.out = str(tmp_path / "weights")
    with torch.enable_grad():
        train(recipe)
    export_llava(tmp_path / "weights", tmp_path / "llava", preset, torch.float32)
    config = json.loads((tmp_path / "llava" / "config.json").read_text(encoding="utf-8"))["text_config"]
    assert config["max_position_embeddings"] == 512
    scaling = math.sqrt(1 + math.log(2048 / 512) / math.log(512))
    for name in ("attention_factor", "short_mscale", "long_mscale"):
        assert config["rope_parameters"][name] == pytest.approx(scaling)
    ours, _ = load_model(preset, tmp_path / "weights", torch.float32)
    exported = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava", dtype=torch.float32).model.language_model
    embeddings = torch.randn(2, 20, 64)
    expected = ours.unwrapped_language_model.get_decoder()(inputs_embeds=embeddings).last_hidden_state
    assert_close(exported(inputs_embeds=embeddings).last_hidden_state, expected)


def test_transformers_pipeline_reads_it(tiny, exported):
    from transformers import pipeline

    _, _, folder = exported
    pipe = pipeline("image-text-to-text", model=str(folder), dtype=torch.float32, device="cpu")
    answer = pipe(text=asked(str(tiny / "pictures" / "1.png")), max_new_tokens=6, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str) and answer[0]["generated_text"]


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_the_template_says_what_the_prompt_builder_says(exported, name):
    _, _, folder = exported
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat_format = replace(CHAT_FORMATS[name], default_system=None)
    messages = [
        Message("system", "Be kind."),
        Message("user", "Is it?"),
        Message("assistant", "Yes."),
        Message("user", "A"),
    ]
    tokenizer.chat_template = chat_template(chat_format)
    theirs = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.text} for message in messages],
        add_generation_prompt=True,
        return_dict=True,
    )
    assert (
        theirs["input_ids"]
        == tokenize_conversation(messages, tokenizer, chat_format, 1, add_generation_prompt=True).token_ids
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "projector", "message"),
    [("phi3-pooled", "llava", "pooled"), ("phi3-patches", "mlp", "'mlp'"), ("phi-patches", "llava", "bias")],
)
def test_what_llava_has_no_place_for_is_named(tiny, tmp_path, name, projector, message):
    recipe = Recipe(
        train=[str(tiny / "train.json")],
        features=str(tiny / f"features-{name.split('-')[1]}"),
        preset=name,
        projector=projector,
        intermediate_size=64,
        out=str(tmp_path / "weights"),
        max_steps=1,
        report_to=["none"],
    )
    train(recipe)
    with pytest.raises(BadInput, match=message):
        export_llava(tmp_path / "weights", tmp_path / "llava", PRESETS[name])


@pytest.mark.slow
def test_siglip_is_exported_too(tiny, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from mmchat.models.image_encoder import find_image_encoder, load_image_encoder
    from mmchat.training.data.features import embed_folder

    encoder = find_image_encoder(HubRepository(str(tiny / "siglip")))
    embed_folder(tiny / "pictures", tmp_path / "features", encoder, load_image_encoder(encoder))
    recipe = Recipe(
        train=[str(tiny / "train.json")],
        features=str(tmp_path / "features"),
        image_encoder=str(tiny / "siglip"),
        preset="phi3-patches",
        projector="llava",
        intermediate_size=64,
        out=str(tmp_path / "weights"),
        max_steps=2,
        report_to=["none"],
    )
    train(recipe)
    export_llava(tmp_path / "weights", tmp_path / "llava", PRESETS["phi3-patches"], torch.float32)
    assert_names_of_vllm(tmp_path / "llava", PRESETS["phi3-patches"], VLLM_SIGLIP)
    processor = AutoProcessor.from_pretrained(tmp_path / "llava")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava", dtype=torch.float32).eval()
    picture = Image.open(tiny / "pictures" / "1.png").convert("RGB")
    inputs = processor.apply_chat_template(asked(picture), tokenize=True, return_dict=True, return_tensors="pt")
    engine = LocalEngine(PRESETS["phi3-patches"], tmp_path / "weights")
    features = engine.image_encoder.encode([picture])
    with torch.no_grad():
        found = model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        assert_close(found[0], engine.model.projector(features)[0])
