"""Checkpoints of the published layouts → folders that chat, with the logits that their descriptions give."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import gelu, layer_norm, linear

from mmchat.checkpoints.importing import import_checkpoint
from mmchat.checkpoints.known_checkpoints import PROJECTS
from mmchat.checkpoints.weights_folder import default_weights, load_model, preset_for_weights
from mmchat.engine import LocalEngine
from mmchat.errors import WeightsError
from mmchat.fetching.cache import cache_folder
from mmchat.models.language_model import load_language_model
from mmchat.presets import PRESETS, HubRepository
from tests.close import assert_close
from tests.in_process import run_script

RANK, ALPHA = 4, 8
WIDTH = 64  # of the tiny language models' tokens
TEXT = torch.tensor([[11, 12, 13, 14, 15]])


def matrix(*shape):
    return torch.randn(*shape) * 0.1


def two_layers(before, between, after):
    return {
        f"{before}weight": matrix(between, 20),
        f"{before}bias": matrix(between),
        f"{after}weight": matrix(WIDTH, between),
        f"{after}bias": matrix(WIDTH),
    }


class LayoutA:
    """PEFT's folder; LayerNorm, Linear, GELU, Linear; one pooled feature."""

    preset, targets, marker = "phi3-pooled", ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), None

    def projector(self):
        return {"pre_norm.weight": matrix(20), "pre_norm.bias": matrix(20), **two_layers("proj.0.", 24, "proj.2.")}

    def project(self, t, x):
        x = layer_norm(x, (20,), t["pre_norm.weight"], t["pre_norm.bias"])
        x = gelu(linear(x, t["proj.0.weight"], t["proj.0.bias"]))
        return linear(x, t["proj.2.weight"], t["proj.2.bias"])


class LayoutB:
    """lora_weights.pt; Linear, GELU, Linear with copies of the first weights; one pooled feature."""

    preset, targets, marker = "phi3-pooled", ("o_proj", "down_proj"), None

    def projector(self):
        copies = {"initial_weights1": matrix(24, 20), "initial_weights2": matrix(WIDTH, 24)}
        return {**copies, **two_layers("layer1.", 24, "layer2.")}

    def project(self, t, x):
        x = gelu(linear(x, t["layer1.weight"], t["layer1.bias"]))
        return linear(x, t["layer2.weight"], t["layer2.bias"])


class LayoutC:
    """PEFT's folder on Phi-2; a linear layer and a residual block; patches, and a word behind them."""

    preset, targets, marker = "phi-patches", ("q_proj", "k_proj", "v_proj", "fc1", "fc2"), "<|im_start|>"

    def projector(self):
        block = {"pre_norm.weight": matrix(WIDTH), "pre_norm.bias": matrix(WIDTH)}
        for name in ("proj.0.", "proj.2."):
            block |= {f"{name}weight": matrix(WIDTH, WIDTH), f"{name}bias": matrix(WIDTH)}
        return {"weight": matrix(WIDTH, 24), "bias": matrix(WIDTH), **block}

    def project(self, t, x):
        x = linear(x, t["weight"], t["bias"])
        x = layer_norm(x, (WIDTH,), t["pre_norm.weight"], t["pre_norm.bias"])
        inner = gelu(linear(x, t["proj.0.weight"], t["proj.0.bias"]))
        return x + linear(inner, t["proj.2.weight"], t["proj.2.bias"])


class LayoutD:
    """PEFT's folder on Phi-2; one linear layer; patches."""

    preset, targets, marker = "phi-patches", ("q_proj", "dense", "fc1"), None

    def projector(self):
        return {"linear.weight": matrix(WIDTH, 24), "linear.bias": matrix(WIDTH)}

    def project(self, t, x):
        return linear(x, t["linear.weight"], t["linear.bias"])


class LayoutE:
    """PEFT's folder on Phi-2; one linear layer that has no name; patches."""

    preset, targets, marker = "phi-patches", ("q_proj", "dense", "fc1"), None

    def projector(self):
        return {"weight": matrix(WIDTH, 24), "bias": matrix(WIDTH)}

    def project(self, t, x):
        return linear(x, t["weight"], t["bias"])


class LayoutF:
    """PEFT's folder; a linear layer, a LayerNorm and several residual blocks; one pooled feature."""

    preset, targets, marker, depth = "phi3-pooled", ("qkv_proj", "o_proj"), None, 3

    def projector(self):
        tensors = {"output.weight": matrix(WIDTH, 20), "output.bias": matrix(WIDTH)}
        tensors |= {"norm.weight": matrix(WIDTH), "norm.bias": matrix(WIDTH)}
        for name in (f"projection_layers.{block}.{layer}." for block in range(self.depth) for layer in (0, 2)):
            tensors |= {f"{name}weight": matrix(WIDTH, WIDTH), f"{name}bias": matrix(WIDTH)}
        return tensors

    def project(self, t, x):
        x = layer_norm(linear(x, t["output.weight"], t["output.bias"]), (WIDTH,), t["norm.weight"], t["norm.bias"])
        for block in range(self.depth):
            first, second = (f"projection_layers.{block}.{layer}." for layer in (0, 2))
            inner = gelu(linear(x, t[f"{first}weight"], t[f"{first}bias"]))
            x = x + linear(inner, t[f"{second}weight"], t[f"{second}bias"])
        return x


LAYOUTS = {"a": LayoutA(), "b": LayoutB(), "c": LayoutC(), "d": LayoutD(), "e": LayoutE(), "f": LayoutF()}


def publish(name, folder):
    """Writes a checkpoint of a layout; gives the adapter's matrices layer by layer, and the projector's tensors."""
    layout = LAYOUTS[name]
    base, _ = load_language_model(PRESETS[layout.preset].language_model, torch.float32)
    layers = {
        path: (matrix(RANK, module.in_features), matrix(module.out_features, RANK))
        for path, module in base.named_modules()
        if path.endswith(layout.targets)
    }
    folder.mkdir(exist_ok=True)
    projector = layout.projector()
    if name == "b":
        tensors = {}
        for path, (down, up) in layers.items():
            tensors |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up, f"{path}.scaling": {"default": 2.0}}
        torch.save(tensors, folder / "lora_weights.pt")
    else:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(layout.targets), task_type="CAUSAL_LM")
        adapted = get_peft_model(base, config)
        for path, (down, up) in layers.items():
            module = adapted.get_submodule(f"base_model.model.{path}")
            module.lora_A["default"].weight.data.copy_(down)
            module.lora_B["default"].weight.data.copy_(up)
        adapted.save_pretrained(folder)
    if name == "c":  # two files
        torch.save({key: projector.pop(key) for key in ("weight", "bias")}, folder / "projector.pth")
        torch.save(projector, folder / "resblock.pth")
        return layers, {**torch.load(folder / "projector.pth"), **projector}
    torch.save(projector, folder / "image_projector.pth")
    return layers, projector


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_the_logits_are_those_of_the_description(tiny, tmp_path, name):
    torch.manual_seed(0)
    layout = LAYOUTS[name]
    preset = PRESETS[layout.preset]
    layers, projector = publish(name, tmp_path / "published")
    report = import_checkpoint(
        tmp_path / "published",
        tmp_path / "ours",
        preset,
        marker_token=layout.marker,
        image_encoder=str(tiny / "clip") if name == "e" else None,
    )
    preset = preset_for_weights(preset, tmp_path / "ours")

    base, tokenizer = load_language_model(preset.language_model, torch.float32)
    features = torch.randn(1, preset.image_encoder.feature_count, preset.image_encoder.image_dim)
    words = base.get_input_embeddings()(TEXT)
    picture = layout.project(projector, features)
    if layout.marker:
        (word,) = tokenizer.encode(layout.marker)
        picture = torch.cat([picture, base.get_input_embeddings().weight[word].expand(1, 1, -1)], dim=1)
    for path, (down, up) in layers.items():
        base.get_submodule(path).weight += ALPHA / RANK * up @ down
    expected = base(inputs_embeds=torch.cat([words[:, :2], picture, words[:, 2:]], dim=1)).logits

    model, _ = load_model(preset, tmp_path / "ours", torch.float32)
    tokens = torch.cat([TEXT[:, :2], torch.full((1, model.tokens_per_image), -200), TEXT[:, 2:]], dim=1)
    found = model.language_model(inputs_embeds=model.splice(tokens, features)).logits
    assert_close(found, expected)
    published = {key for file in (tmp_path / "published").glob("*.pt*") for key in torch.load(file)}
    published |= {key for file in (tmp_path / "published").glob("*.safetensors") for key in load_file(file)}
    assert len(published) == len(projector) + len(layers) * (3 if name == "b" else 2)
    assert published <= report.taken.keys() | report.ignored.keys()
    assert len(report.ignored) == (2 if name == "b" else 0) and str(report)


def test_the_image_encoder_can_be_named(tiny, tmp_path):
    publish("d", tmp_path / "published")
    preset = PRESETS["phi-patches"]
    settings = {"image_encoder": str(tiny / "clip"), "image_layer": -1, "class_token": True}
    report = import_checkpoint(tmp_path / "published", tmp_path / "ours", preset, **settings)
    encoder = preset_for_weights(preset, tmp_path / "ours").image_encoder
    assert (encoder.layer, encoder.class_token, encoder.feature_count) == (-1, True, 5)
    assert "--image-encoder" in str(report)


def test_vandanas_pictures_end_with_the_word_comment(tiny, tmp_path):
    from transformers import AutoTokenizer

    publish("c", tmp_path / "published")
    shutil.copytree(tiny / "phi", tmp_path / "phi")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "phi")
    tokenizer.add_tokens("comment")  # one token, as in Phi-2
    tokenizer.save_pretrained(tmp_path / "phi")
    base = PRESETS["phi-patches"]
    language_model = replace(base.language_model, source=HubRepository(str(tmp_path / "phi")))
    preset = replace(base, language_model=language_model)
    report = import_checkpoint(tmp_path / "published", tmp_path / "ours", preset)
    assert "the word 'comment'" in str(report)
    embeddings = load_language_model(language_model, torch.float32)[0].get_input_embeddings().weight
    model, _ = load_model(preset_for_weights(preset, tmp_path / "ours"), tmp_path / "ours", torch.float32)
    assert_close(model.projector.marker, embeddings[tokenizer.convert_tokens_to_ids("comment")])


def test_vasus_image_encoder_is_the_one_with_smaller_patches(tiny, tmp_path, monkeypatch):
    asked_for = []
    monkeypatch.setattr("mmchat.models.image_encoder.fetch", lambda source: asked_for.append(source) or tiny / "clip")
    publish("e", tmp_path / "published")
    report = import_checkpoint(tmp_path / "published", tmp_path / "ours", PRESETS["phi-patches"])
    assert asked_for == [PROJECTS["vasujoshi111"].image_encoder]
    encoder = preset_for_weights(PRESETS["phi-patches"], tmp_path / "ours").image_encoder
    assert encoder.source == asked_for[0] and encoder.source.name == "openai/clip-vit-base-patch16"
    assert encoder.layer == -1 and "vasujoshi111" in str(report)


def edit(path, change):
    tensors = torch.load(path)
    change(tensors)
    torch.save(tensors, path)


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("b", "image_projector.pth", lambda t: t.update({"layer3.weight": matrix(2)}), "No known projector.*layer3"),
        ("b", "image_projector.pth", lambda t: t.pop("layer2.bias"), "linear_2.bias"),
        ("b", "image_projector.pth", lambda t: t.update({"layer1.weight": matrix(24, 19)}), "size 19;.*outputs 20"),
        ("b", "image_projector.pth", lambda t: t.update({"layer2.weight": matrix(63, 24)}), "63"),
        ("b", "image_projector.pth", lambda t: t.update({"layer1.bias": matrix(3)}), r"linear_1.bias.*\(3,\)"),
        ("b", "lora_weights.pt", lambda t: t.pop("model.layers.1.mlp.down_proj.lora_B.weight"), "lacks"),
        ("b", "lora_weights.pt", lambda t: t.update({"model.layers.9.x.lora_A.weight": matrix(4, 4)}), "layers.9"),
        ("b", "lora_weights.pt", lambda t: t.update({"model.layers.0.mlp.down_proj.scaling": 3.0}), "scales"),
        ("b", "lora_weights.pt", lambda t: t.clear(), "no LoRA"),
        ("d", "image_projector.pth", lambda t: t.update({"linear.weight": matrix(WIDTH, 20)}), "size 20;.*outputs 24"),
    ],
)
def test_what_does_not_fit_is_an_error(tiny, tmp_path, name, file, change, message):
    publish(name, tmp_path / "published")
    edit(tmp_path / "published" / file, change)
    with pytest.raises(WeightsError, match=message):
        import_checkpoint(tmp_path / "published", tmp_path / "ours", PRESETS[LAYOUTS[name].preset])
    assert not (tmp_path / "ours").exists()


class Burglar:
    def __reduce__(self):
        return (print, ("the burglar is in",))


def test_pickled_code_is_refused(tiny, tmp_path, capsys):
    publish("b", tmp_path / "published")
    with (tmp_path / "published" / "lora_weights.pt").open("wb") as file:
        pickle.dump(Burglar(), file)
    with pytest.raises(WeightsError, match="lora_weights.pt"):
        import_checkpoint(tmp_path / "published", tmp_path / "ours", PRESETS["phi3-pooled"])
    assert "burglar" not in capsys.readouterr().out


def test_the_trainers_state_beside_a_projector_is_left(tiny, tmp_path):
    publish("d", tmp_path / "published")
    file = tmp_path / "published" / "image_projector.pth"
    tensors = torch.load(file)
    state = {"epoch": 1, "model_state_dict": tensors, "optimizer_state_dict": {"state": {}}, "loss": 1.5}
    torch.save(state, file)
    preset = PRESETS["phi-patches"]
    report = import_checkpoint(tmp_path / "published", tmp_path / "ours", preset)
    assert report.ignored.keys() == state.keys() - {"model_state_dict"} and tensors.keys() <= report.taken.keys()


def test_the_prompt_template_of_the_project_is_imported_with_a_note(tiny, tmp_path):
    publish("b", tmp_path / "published")
    preset = PRESETS["phi3-pooled"]
    report = import_checkpoint(tmp_path / "published", tmp_path / "ours", preset)
    assert preset_for_weights(preset, tmp_path / "ours").prompt_template == PROJECTS["sayanbanerjee32"].prompt_template
    assert "sayanbanerjee32" in str(report)
    report = import_checkpoint(tmp_path / "published", tmp_path / "c", preset, project="ChintanShahDS")
    assert "never learned to end" in str(report)
    import_checkpoint(tmp_path / "published", tmp_path / "none", preset, project="none")
    assert preset_for_weights(preset, tmp_path / "none").prompt_template is None
    with pytest.raises(WeightsError, match="no project 'nobody'"):
        import_checkpoint(tmp_path / "published", tmp_path / "x", preset, project="nobody")


MISTAKES = {  # flags of the script -> what it says
    "published --project nobody": "argument --project: invalid choice: 'nobody' (choose from ",
    "published --project walnashgit": "walnashgit's weights are for phi-2; 'far-away' is phi-3.",
    "nowhere": "There is no folder 'nowhere'.",
    "published/projector.pth": "'projector.pth' is a file: name the folder of the adapter, and this with --projector.",
    "published --projector none.pth": "There is no file 'none.pth'.",
    "published": "No known projector has the tensors ",
    "llava": "'llava' is a LLaVA model, which needs no import: chat with it through --weights.",
    "weights": "'weights' is a weights folder of mmchat, which needs no import: chat with it through --weights.",
    "empty": "'empty' holds no projector: name its files with --projector.",
    "empty --projector published/projector.pth": "'empty' holds no adapter: neither adapter_config.json nor",
    "published --out weights": "weights is not empty. Name another folder, or empty it.",
}


def test_mistakes_get_a_sentence_before_the_base_model_is_fetched(tiny, tmp_path, monkeypatch):
    for file in ("published/adapter_config.json", "llava/config.json", "weights/mmchat.json"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text('{"model_type": "llava"}')
    (tmp_path / "empty").mkdir()
    torch.save({"unknown": matrix(2)}, tmp_path / "published" / "projector.pth")
    base = PRESETS["phi3-pooled"]
    far_away = replace(base.language_model, source=HubRepository("nobody/nothing"))
    monkeypatch.setitem(PRESETS, "far-away", replace(base, name="far-away", language_model=far_away))
    for flags, says in MISTAKES.items():
        result = run_script(f"training_scripts/import_checkpoint.py --preset far-away --out out {flags}", tmp_path)
        assert result.returncode and says in result.stderr and "Traceback" not in result.stderr, (flags, result.stderr)
    listed = run_script("training_scripts/import_checkpoint.py --help").stdout.replace("\n", " ")
    assert all(name in listed for name in PROJECTS)


@pytest.mark.slow
def test_a_presets_published_weights_are_imported_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("MMCHAT_CACHE", str(tmp_path / "cache"))
    publish("b", tmp_path / "published")
    preset = replace(PRESETS["phi3-pooled"], weights=HubRepository(str(tmp_path / "published")))
    folder = default_weights(preset)
    assert folder.is_relative_to(cache_folder())
    shutil.rmtree(tmp_path / "published")
    assert default_weights(preset) == folder
    assert LocalEngine(preset).model.has_adapter


@pytest.mark.slow
def test_the_script_reports_every_tensor(tiny, tmp_path):
    publish("b", tmp_path / "published")
    result = run_script("training_scripts/import_checkpoint.py published --preset phi3-pooled --out ours", tmp_path)
    assert result.returncode == 0, result.stderr
    shown = result.stdout
    assert "layer1.weight  →  linear_1.weight" in shown and "initial_weights1  ignored" in shown
    assert "2 ignored" in shown and "--weights ours" in shown


@pytest.mark.slow
def test_the_script_takes_an_image_encoder(tiny, tmp_path):
    publish("d", tmp_path / "published")
    flags = f"--image-encoder {tiny / 'clip'} --image-layer -1 --image-features patches --no-class-token"
    command = f"training_scripts/import_checkpoint.py published --preset phi-patches {flags} --out ours"
    result = run_script(command, tmp_path)
    assert result.returncode == 0, result.stderr
    encoder = preset_for_weights(PRESETS["phi-patches"], tmp_path / "ours").image_encoder
    assert encoder.source == HubRepository(str(tiny / "clip"))  # walnash's defaults are layer -4 and the class token
    assert (encoder.layer, encoder.features, encoder.class_token) == (-1, "patches", False)
