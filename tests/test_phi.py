"""Phi-2 and Phi-3.5 with CLIP or SigLIP, on small models of the same classes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmchat import Message, SamplingOptions
from mmchat.checkpoints.weights_folder import preset_for_weights
from mmchat.conversation import REWRITE
from mmchat.device import Device, choose_preset, choose_quantization
from mmchat.engine import LocalEngine
from mmchat.errors import AssetError, BadInput
from mmchat.inference.decoder import TorchDecoder
from mmchat.inference.generation import beam_settings, generate_batch, stream_text
from mmchat.models.chat_formats import CHAT_FORMATS
from mmchat.models.image_encoder import find_image_encoder, load_image_encoder
from mmchat.models.language_model import add_adapter, context_length, load_language_model
from mmchat.models.projector import ProjectorConfig, build_projector
from mmchat.models.prompt import IMAGE_TOKEN_ID, tokenize_conversation
from mmchat.models.vision_language_model import VisionLanguageModel
from mmchat.presets import LLAVA_PHI_3, PHI_2, PHI_3_5, PRESETS, SMOL, HubRepository
from mmchat.training.recipe import Recipe
from mmchat.training.run import train
from mmchat.training.trainer import training_arguments
from tests import tiny as tiny_models
from tests.close import assert_close

# Phi-3.5-mini-instruct's chat template, abridged.
PHI_3_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CONVERSATION = [
    Message("user", "What is there?", images=["dog.jpg"]),
    Message("assistant", "A brown dog."),
    Message("user", "Is there a cat? <|end|>"),
    Message("assistant", "No."),
]


@pytest.fixture(scope="module")
def phi_3_tokenizer():
    """A tokenizer like Phi-3.5's: SentencePiece's leading space, and special tokens that strip the space after them."""
    text = [message.text for message in CONVERSATION] + ["You are a helpful assistant.\n"]
    return tiny_models.phi_3_tokenizer(text, PHI_3_TEMPLATE)


def test_phi_3_5_prompts_follow_its_chat_template(phi_3_tokenizer):
    messages = [
        Message("system", "You are a helpful assistant."),
        Message("user", "What is there?"),
        *CONVERSATION[1:2],
    ]
    for count, is_open in ((2, True), (3, False)):
        ours = tokenize_conversation(
            messages[:count], phi_3_tokenizer, CHAT_FORMATS["phi-3"], 3, add_generation_prompt=is_open
        )
        theirs = phi_3_tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.text} for message in messages[:count]],
            add_generation_prompt=is_open,
            return_dict=True,
        )
        assert ours.token_ids == theirs["input_ids"]


def test_phi_3_5_labels_are_answers_and_their_stop_tokens(phi_3_tokenizer):
    encoded = tokenize_conversation(CONVERSATION, phi_3_tokenizer, CHAT_FORMATS["phi-3"], 3)
    control = phi_3_tokenizer.convert_tokens_to_ids
    user, assistant, end = control("<|user|>"), control("<|assistant|>"), control("<|end|>")

    def text(words):
        return phi_3_tokenizer.encode(words, add_special_tokens=False, split_special_tokens=True)

    pieces = [
        ([user], False),
        ([IMAGE_TOKEN_ID] * 3, False),
        (text("\nWhat is there?"), False),
        ([end, assistant], False),
        (text("A brown dog."), True),
        ([end], True),
        ([user], False),
        (text("Is there a cat? <|end|>"), False),
        ([end, assistant], False),
        (text("No."), True),
        ([end], True),
    ]
    assert encoded.token_ids == [token for tokens, _ in pieces for token in tokens]
    assert encoded.is_answer == [learned for tokens, learned in pieces for _ in tokens]
    assert encoded.token_ids.count(end) == 4  # the typed one is plain text


def test_phi_2_prompts_follow_its_model_card(tiny):
    _, tokenizer = load_language_model(PRESETS["phi-pooled"].language_model, torch.float32)
    encoded = tokenize_conversation(CONVERSATION, tokenizer, CHAT_FORMATS["phi-2"], 1)
    shown = tokenizer.decode([token for token in encoded.token_ids if token != IMAGE_TOKEN_ID])
    assert shown == (
        "Instruct: What is there?\nOutput: A brown dog.<|endoftext|>\nInstruct: Is there a cat? <|end|>\n"
        "Output: No.<|endoftext|>\n"
    )
    assert encoded.token_ids.index(IMAGE_TOKEN_ID) == len(tokenizer.encode("Instruct:"))
    learned = [token for token, is_answer in zip(encoded.token_ids, encoded.is_answer, strict=True) if is_answer]
    assert tokenizer.decode(learned) == " A brown dog.<|endoftext|> No.<|endoftext|>"


@pytest.mark.parametrize("name", ["phi3-pooled", "phi-pooled", "llama-pooled"])
def test_every_stop_token_ends_an_answer_and_padding_is_not_one(tiny, name):
    preset = PRESETS[name].language_model
    model, tokenizer = load_language_model(preset, torch.float32)
    stops = set(tokenizer.convert_tokens_to_ids(list(CHAT_FORMATS[preset.chat_format].stops)))
    assert set(model.generation_config.eos_token_id) == stops and None not in stops
    head = model.get_output_embeddings()
    head.weight.data.zero_()
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    for stop in stops:
        head.bias.data.zero_()
        head.bias.data[stop] = 1
        assert generate_batch(model, tokenizer, [torch.randn(3, 64)], SamplingOptions(max_new_tokens=4)) == [""]
    head.bias.data.zero_()
    head.bias.data[tokenizer.convert_tokens_to_ids("a")] = 1  # never a stop token: no row is cut
    texts = generate_batch(
        model, tokenizer, [torch.randn(3, 64), torch.randn(2, 64)], SamplingOptions(max_new_tokens=4)
    )
    assert texts == ["aaaa", "aaaa"]


# Two published training logs print the first three counts for Phi-3.5; a 4-bit layer packs two weights into one value.
COUNTS = {"phi-3.5": (111_680_512, 2_120_820_736, 3_932_760_064), "phi-2": (102_896_640, 1_624_289_280, 2_882_580_480)}
CONFIGS = {
    "phi-3.5": {
        "class": "Phi3Config",
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 131_072,
        "pad_token_id": 32_000,
    },
    "phi-2": {
        "class": "PhiConfig",
        "vocab_size": 51_200,
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "partial_rotary_factor": 0.4,
    },
}


@pytest.mark.parametrize("preset", [PHI_3_5, PHI_2], ids=lambda preset: preset.name)
def test_parameter_counts_equal_the_published_ones(preset):
    import transformers

    config = dict(CONFIGS[preset.name])
    config = getattr(transformers, config.pop("class"))(**config)
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
        assert sum(weight.numel() for weight in base.parameters()) == preset.language_model.parameters
        linear = sum(
            module.weight.numel()
            for name, module in base.named_modules()
            if isinstance(module, torch.nn.Linear) and name != "lm_head"
        )
        adapted = add_adapter(base, rank=64, alpha=16, dropout=0.0, base_name=preset.name)
        encoder = preset.image_encoder
        shape = ProjectorConfig(
            preset.projector.kind,
            encoder.image_dim,
            preset.projector.intermediate_size,
            config.hidden_size,
            encoder.feature_count,
        )
        model = VisionLanguageModel(adapted, build_projector(shape), shape)
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    everything = sum(weight.numel() for weight in model.parameters())
    assert (trainable, everything - linear // 2, everything) == COUNTS[preset.name]


class TestImageEncoders:
    @pytest.fixture
    def picture(self):
        return Image.effect_noise((50, 40), 90).convert("RGB")

    @pytest.mark.parametrize("layer", [-1, -2, 1])
    @pytest.mark.parametrize("class_token", [False, True])
    def test_patches_of_any_layer(self, tiny, picture, layer, class_token):
        preset = find_image_encoder(HubRepository(str(tiny / "clip")), "patches", layer, class_token)
        encoder = load_image_encoder(preset)
        found = encoder.encode([picture])
        states = encoder.network(encoder.preprocess(picture)[None], output_hidden_states=True).hidden_states[layer]
        assert_close(found, states if class_token else states[:, 1:])
        assert found.shape[1:] == (preset.feature_count, preset.image_dim) == (4 + class_token, 24)

    def test_pooled_features_are_clips_image_embedding(self, tiny, picture):
        preset = find_image_encoder(HubRepository(str(tiny / "clip")), "pooled")
        encoder = load_image_encoder(preset)
        expected = encoder.network(encoder.preprocess(picture)[None]).image_embeds
        assert_close(encoder.encode([picture])[:, 0], expected)
        assert preset.image_dim == 20

    @pytest.mark.parametrize(("features", "count"), [("patches", 4), ("pooled", 1)])
    def test_siglip(self, tiny, picture, features, count):
        preset = find_image_encoder(HubRepository(str(tiny / "siglip")), features, class_token=True)
        found = load_image_encoder(preset).encode([picture])
        assert found.shape == (1, count, 24) == (1, preset.feature_count, preset.image_dim)

    def test_other_models_are_rejected_as_image_encoders(self, tiny):
        with pytest.raises(BadInput, match="not a CLIP or SigLIP model"):
            find_image_encoder(HubRepository(str(tiny / "phi3")))
        for nowhere in ("./mine", "clip-vit-base-patch32"):
            with pytest.raises(AssetError, match=f"There is no folder '{Path(nowhere).name}'"):
                find_image_encoder(HubRepository(nowhere))
        with pytest.raises(BadInput, match="no layer -9"):
            find_image_encoder(HubRepository(str(tiny / "clip")), layer=-9)

    @pytest.mark.slow
    def test_weights_name_their_image_encoder(self, tiny, tmp_path, picture, monkeypatch):
        from mmchat.training.data.features import embed_folder

        monkeypatch.chdir(tiny)
        encoder = find_image_encoder(HubRepository("siglip"), "patches", -1)
        embed_folder(tiny / "pictures", tmp_path / "features", encoder, load_image_encoder(encoder))
        recipe = Recipe(
            train=[str(tiny / "train.json")],
            features=str(tmp_path / "features"),
            preset="phi3-pooled",
            image_encoder="siglip",
            image_layer=-1,
            out=str(tmp_path / "run"),
            max_steps=1,
            report_to=["none"],
        )
        train(recipe)
        monkeypatch.chdir(tmp_path)
        own = PRESETS["phi3-pooled"]
        assert preset_for_weights(own, tmp_path / "run").image_encoder == encoder
        config = tmp_path / "run" / "mmchat.json"
        config.write_text(config.read_text().replace('"image_dim": 24,', '"width": 24,', 1))  # as older folders have it
        assert preset_for_weights(own, tmp_path / "run").image_encoder == encoder
        engine = LocalEngine(own, tmp_path / "run")
        assert engine.preset.image_encoder == encoder
        "".join(engine.reply([Message("user", "What is it?", [picture])], SamplingOptions(max_new_tokens=3)))


@pytest.fixture(scope="module", params=["phi3-pooled", "phi-patches"])
def trained(request, tiny, tmp_path_factory):
    """A preset, and weights from a few steps of our training in 4 bits."""
    folder = tmp_path_factory.mktemp(request.param)
    train(
        Recipe(
            train=[str(tiny / "train.json")],
            features=str(tiny / f"features-{request.param.split('-')[1]}"),
            preset=request.param,
            quantization="4bit-double",
            out=str(folder),
            max_steps=6,
            lr=1e-2,
            report_to=["none"],
        )
    )
    return PRESETS[request.param], folder


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_a_model_trained_in_4_bits_chats(tiny, trained, quantization):
    preset, folder = trained
    engine = LocalEngine(preset, folder, quantization)
    question = Message("user", "Describe the image.", [tiny / "pictures" / "3.png"])
    assert "".join(engine.reply([question], SamplingOptions(temperature=0, max_new_tokens=8)))
    assert engine.quantization.kind == quantization


def test_rewriting_uses_the_base_model_alone(tiny, trained):
    preset, folder = trained
    engine = LocalEngine(preset, folder)
    options = SamplingOptions(temperature=0, max_new_tokens=8, repetition_penalty=1.0)
    rewritten = "".join(engine.rewrite("Is there a dog?", "dog yes", options))
    base, tokenizer = load_language_model(preset.language_model, torch.float32)
    asked = Message("user", REWRITE.format(question="Is there a dog?", draft="dog yes"))
    encoded = tokenize_conversation(
        [asked], tokenizer, CHAT_FORMATS[preset.language_model.chat_format], 1, add_generation_prompt=True
    )
    embeddings = base.get_input_embeddings()(torch.tensor([encoded.token_ids]))
    assert rewritten == "".join(stream_text(TorchDecoder(base), tokenizer, embeddings, options))
    adapted = "".join(stream_text(TorchDecoder(engine.language_model), tokenizer, embeddings, options))
    assert adapted != rewritten  # else the test could not fail


@pytest.mark.parametrize(("kind", "is_nested"), [("4bit", False), ("4bit-double", True)])
def test_4bit_is_nf4_and_double_quantizes_the_scales(tiny, kind, is_nested):
    model, _ = load_language_model(PRESETS["phi3-pooled"].language_model, torch.float32, kind)
    weights = [weight for name, weight in model.named_parameters() if "o_proj" in name]
    assert weights and {weight.quant_type for weight in weights} == {"nf4"}
    assert {weight.quant_state.nested for weight in weights} == {is_nested}


def test_presets_pin_their_models():
    """Stop tokens are those of the models' authors; models and weights are pinned by commit."""
    assert set(CHAT_FORMATS["phi-3"].stops) == {"<|end|>", "<|assistant|>", "<|endoftext|>"}
    assert set(CHAT_FORMATS["phi-2"].stops) == {"<|endoftext|>"}
    for preset in (PHI_2, PHI_3_5, LLAVA_PHI_3):
        for part in (preset.language_model, preset.image_encoder):
            assert re.fullmatch(r"[0-9a-f]{40}", part.source.revision), part
        members = [member for _, parts in preset.speech.source.files for member in parts]
        assert all(re.fullmatch(r"[0-9a-f]{64}", member.sha256) for member in members)
    assert PHI_3_5.weights.revision == "a3728b2d7b7c337922e36126519b653a2fd2bbd7"


def test_padding_is_not_a_stop_token():
    stop_ids = {0, 1, 7}
    settings = beam_settings(SamplingOptions(), stop_ids)
    assert settings.pad_token_id not in stop_ids and set(settings.eos_token_id) == stop_ids


def test_quantization_is_chosen_with_a_reason(monkeypatch):
    cpu, gpu = Device("cpu", torch.float32, ""), Device("cuda", torch.bfloat16, "")
    assert choose_quantization("auto", cpu, 10**9).kind == "none"
    assert choose_quantization("8bit", cpu, 10**9).kind == "8bit"
    with pytest.raises(BadInput, match="3bit"):
        choose_quantization("3bit", cpu, 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(8e9), int(8e9)))
    small, large = choose_quantization("auto", gpu, 10**9), choose_quantization("auto", gpu, 4 * 10**9)
    assert (small.kind, large.kind) == ("none", "4bit") and "8 GB" in large.reason
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    assert choose_quantization("auto", gpu, 4 * 10**9).kind == "none"


def test_flash_attention_falls_back_with_a_warning(tiny, monkeypatch, caplog):
    monkeypatch.setenv("MMCHAT_ATTENTION", "flash_attention_2")
    with caplog.at_level("WARNING"):
        model, _ = load_language_model(PRESETS["phi3-pooled"].language_model, torch.float32)
    assert model.config._attn_implementation == "sdpa" and "flash-attn is not installed" in caplog.text


def test_auto_chooses_only_what_will_load(monkeypatch):
    from mmchat import device

    preset, reason = choose_preset()
    assert preset is SMOL and "no GPU" in reason or torch.cuda.is_available()
    monkeypatch.setattr(device, "choose_device", lambda: Device("cuda", torch.bfloat16, "a GPU"))

    def on(free, installed=True, available=lambda repository: True):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 1e9), int(80e9)))
        monkeypatch.setattr(device, "find_spec", lambda name: object() if installed else None)
        monkeypatch.setattr(device, "can_fetch", available)
        return choose_preset()

    assert on(24)[0] is LLAVA_PHI_3 and on(6)[0] is LLAVA_PHI_3 and on(24, installed=False)[0] is LLAVA_PHI_3
    assert on(5)[0] is PHI_3_5
    preset, reason = on(6, installed=False)
    assert preset is SMOL and "4 bits only" in reason and "pip install 'mmchat[gpu]'" in reason
    preset, reason = on(3)
    assert preset is SMOL and "3.0 GB are free" in reason
    preset, reason = on(24, available=lambda repository: False)
    assert preset is SMOL and LLAVA_PHI_3.weights.name in reason
    published = PHI_3_5.weights
    preset, reason = on(5, available=lambda repository: repository != published)
    assert preset is SMOL and published.name in reason
    assert on(24, available=lambda repository: repository != LLAVA_PHI_3.weights)[0] is PHI_3_5


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["phi3-pooled"], indirect=True)
def test_a_model_trained_in_4_bits_chats_on_the_page_with_and_without_rewriting(tiny, trained):
    from gradio_client import Client, handle_file

    from mmchat.serving import page as ui

    preset, folder = trained
    engine = LocalEngine(preset, folder)
    demo = ui.build(engine, tiny)
    ui.launch(demo, prevent_thread_lock=True, quiet=True)
    try:
        client = Client(demo.local_url, verbose=False)
        picture = handle_file(tiny / "pictures" / "3.png")
        for rewrite in (False, True):
            job = client.submit("Describe the image.", picture, rewrite, api_name="/ask")
            assert job.result(timeout=60)
    finally:
        demo.close()


def test_the_page_shows_the_draft_but_the_model_does_not_see_it(tiny, trained):
    from mmchat.serving.page import Page, to_messages

    preset, folder = trained
    engine = LocalEngine(preset, folder)
    question = Message("user", "Describe the image.", [tiny / "pictures" / "3.png"])
    options = SamplingOptions(temperature=0, max_new_tokens=8)
    *_, turns = Page(engine).answer([question], options, rewrite=True)
    draft = "".join(engine.reply([question], options))
    assert turns[0] == {"role": "assistant", "content": draft, "metadata": {"title": "Draft"}}
    assert turns[1]["content"] == "".join(engine.rewrite(question.text, draft, options))
    assert [message.text for message in to_messages(turns)] == [turns[1]["content"]]


@torch.no_grad()
def test_the_context_ends_where_longrope_changes_its_factors():
    from transformers import Phi3Config, Phi3ForCausalLM

    half = tiny_models.WIDTHS["hidden_size"] // tiny_models.WIDTHS["num_attention_heads"] // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [1.0 + index for index in range(half)],
        "original_max_position_embeddings": 32,
    }
    config = Phi3Config(vocab_size=50, **tiny_models.WIDTHS, rope_parameters=rope, original_max_position_embeddings=32)
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config).eval()
    assert context_length(model.config) == 32
    token_ids = torch.randint(0, 50, (1, 33))
    decoder = TorchDecoder(model)
    cache = decoder.new_cache()
    decoder.prefill(model.get_input_embeddings()(token_ids[:, :30]), cache)
    embeddings = model.get_input_embeddings()(token_ids)
    found = [decoder.prefill(embeddings[:, [position]], cache) for position in (30, 31, 32)]
    for position in (30, 31):
        assert_close(found[position - 30], model(token_ids[:, : position + 1]).logits[:, -1])
    beyond = model(token_ids).logits[:, -1]
    assert (found[2] - beyond).abs().max() > 0.1  # one token more, and what is kept would no longer fit


def test_phi_2_never_computes_in_float16(tiny):
    from dataclasses import replace

    assert PHI_2.language_model.overflows_float16
    preset = replace(PRESETS["phi-pooled"].language_model, overflows_float16=True)
    assert load_language_model(preset, torch.float16)[0].dtype == torch.bfloat16
    assert load_language_model(PRESETS["phi3-pooled"].language_model, torch.float16)[0].dtype == torch.float16
    recipe = Recipe(train=["train.json"], features="features", precision="fp16")
    assert [training_arguments(recipe, preset).fp16 for preset in (PHI_2, PHI_3_5)] == [False, True]
    assert training_arguments(recipe, PHI_2).bf16
