"""LLaVA models as weights: the same numbers and the same words as transformers' LlavaForConditionalGeneration."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from mmchat import Message, SamplingOptions
from mmchat.checkpoints.weights_folder import load_model, preset_trained
from mmchat.engine import LocalEngine, load
from tests import llava
from tests.close import assert_close

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
def test_equal_logits_and_equal_tokens(folder, reference, pictures, count):
    model, processor = reference
    messages = conversation(pictures)[:count]
    engine = load(weights=folder)
    assert engine.about and isinstance(engine, LocalEngine)
    inputs = inputs_of(processor, messages)
    encoded = engine.encode(messages)
    image_id = model.config.image_token_id
    theirs = [-200 if token == image_id else token for token in inputs["input_ids"][0].tolist()]
    assert encoded.token_ids == theirs
    ours = engine.model.language_model(inputs_embeds=engine.embed(encoded)).logits
    assert_close(ours, model(**inputs).logits, 1e-4)
    stops = engine.model.language_model.generation_config.eos_token_id
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=stops, pad_token_id=1)
    written = [token for token in written[0, inputs["input_ids"].shape[1] :].tolist() if token not in stops]
    answer = "".join(engine.reply(messages, SamplingOptions(temperature=0, max_new_tokens=12)))
    assert answer.rstrip("�") == processor.tokenizer.decode(written, skip_special_tokens=True).rstrip("�")


def test_questions_without_a_picture_are_asked_in_the_template_too(folder, reference):
    engine, (_, processor) = load(weights=folder), reference
    asked = [Message("user", "Is there a dog?")]
    assert engine.encode(asked).token_ids == inputs_of(processor, asked)["input_ids"][0].tolist()


def test_nothing_typed_is_a_picture_or_a_turn(folder, pictures):
    engine = load(weights=folder)
    special = engine.tokenizer.convert_tokens_to_ids(["<|end|>", "<|user|>"])
    plain = engine.encode([Message("user", "Is it?", pictures[:1])]).token_ids
    typed = engine.encode([Message("user", "<image> <|end|> <|user|>", pictures[:1])]).token_ids
    for token in (-200, *special):
        assert typed.count(token) == plain.count(token)


def test_no_other_part_is_in_the_language_models_memory(folder):
    preset = preset_trained(folder)
    model, _ = load_model(preset, folder, torch.float32)
    assert not [name for name, _ in model.named_parameters() if "vision" in name]
    assert sum(weight.numel() for weight in model.language_model.parameters()) == preset.language_model.parameters
