"""The prompt template belongs to the weights: it is stored with them, and questions follow it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mmchat import Message, SamplingOptions
from mmchat.checkpoints.known_checkpoints import PROJECTS
from mmchat.checkpoints.weights_folder import load_model, preset_for_weights, save_weights
from mmchat.engine import LocalEngine
from mmchat.errors import WeightsError
from mmchat.models.chat_formats import CHAT_FORMATS, PromptTemplate, chat_format_of
from mmchat.models.prompt import IMAGE_TOKEN_ID, tokenize_conversation
from mmchat.presets import PRESETS
from mmchat.training.recipe import Recipe
from mmchat.training.run import chosen_preset, train
from tests import tiny as tiny_models

QUESTION = "What is there?"
SYSTEM = "You are a helpful assistant."
GIVEN = "Given the following information, provide a detailed and accurate response:"
# Project → what its code puts around a picture, as the strings it hands to its tokenizer one by one; None: the picture.
PROMPTS = {
    "sayanbanerjee32": [
        None,
        f"<|system|>\n{SYSTEM}<|end|>\n<|user|>\n{GIVEN}\n{QUESTION}\n[An image is provided for this task.]\n<|end|>\n"
        "<|assistant|>\n",
    ],
    "ChintanShahDS": [
        "<|system|>\nYou are a helpful assistant good at answering questions based on the given context.<|end|>\n"
        "<|user|>\n",
        None,
        f"\n{QUESTION}<|end|>\n<|assistant|>\n",
    ],
    "RInkalshah93": [None, f"<|user|><image>\n{QUESTION}<|end|><|assistant|>"],
    "vandana1302238": [None, f"{QUESTION} [QA]"],
    "ibrahim737701": [None, f"{QUESTION} [QA]"],
    "walnashgit": [None, f"\nHuman### {QUESTION}\nAI### "],
    "vasujoshi111": ["<iQ>", None, QUESTION, "</iQ>"],
}


@pytest.fixture(scope="module")
def tokenizers(tiny):
    from transformers import AutoTokenizer

    return {
        "phi-3": tiny_models.phi_3_tokenizer([QUESTION, SYSTEM, GIVEN]),
        "phi-2": AutoTokenizer.from_pretrained(tiny / "phi"),
    }


def format_of(template, name):
    return replace(CHAT_FORMATS[name], prompt_template=template)


@pytest.mark.parametrize("name", PROJECTS)
def test_each_project_is_asked_token_for_token_as_its_code_asks(tokenizers, name):
    project = PROJECTS[name]
    tokenizer = tokenizers[project.chat_format]
    tokenizer.add_special_tokens({"additional_special_tokens": list(project.prompt_template.added_tokens)}, False)
    encoded = tokenize_conversation(
        [Message("user", QUESTION, ["a.jpg"])],
        tokenizer,
        format_of(project.prompt_template, project.chat_format),
        3,
        add_generation_prompt=True,
    )
    expected = []
    for text in PROMPTS[name]:
        expected += [IMAGE_TOKEN_ID] * 3 if text is None else tokenizer.encode(text, add_special_tokens=False)
    assert encoded.token_ids == expected and encoded.images == ["a.jpg"]


def test_a_token_of_the_templates_own_is_one_token_that_nobody_can_type(tokenizers):
    tokenizer, project = tokenizers["phi-2"], PROJECTS["vandana1302238"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["[QA]"]}, False)
    typed = [Message("user", "Is it [QA]?", ["a.jpg"])]
    encoded = tokenize_conversation(typed, tokenizer, format_of(project.prompt_template, "phi-2"), 1)
    own = tokenizer.convert_tokens_to_ids("[QA]")
    assert encoded.token_ids.count(own) == 1 and encoded.token_ids[-2:] == [*tokenizer.encode(" "), own]


def test_the_system_text_opens_the_conversation_once_and_a_callers_replaces_it(tokenizers):
    tokenizer = tokenizers["phi-3"]
    chat_format = format_of(PROJECTS["sayanbanerjee32"].prompt_template, "phi-3")
    turns = [Message("user", "One?", ["a"]), Message("assistant", "A dog."), Message("user", "Two?", ["b"])]
    system = tokenizer.convert_tokens_to_ids("<|system|>")
    encoded = tokenize_conversation(turns, tokenizer, chat_format, 1, add_generation_prompt=True)
    assert encoded.token_ids.count(system) == 1 and encoded.token_ids[0] == IMAGE_TOKEN_ID
    learned = [token for token, is_answer in zip(encoded.token_ids, encoded.is_answer, strict=True) if is_answer]
    assert tokenizer.decode(learned).strip() == "A dog.<|end|>" and encoded.images == ["a", "b"]
    mine = tokenize_conversation([Message("system", "Rhyme."), *turns], tokenizer, chat_format, 1)
    assert mine.token_ids.count(system) == 1 and "helpful" not in tokenizer.decode([t for t in mine.token_ids if t > 0])


def test_questions_without_a_picture_are_asked_as_the_base_model_was(tokenizers):
    tokenizer, template = tokenizers["phi-3"], PROJECTS["sayanbanerjee32"].prompt_template
    asked = [Message("user", QUESTION)]
    plain = tokenize_conversation(asked, tokenizer, CHAT_FORMATS["phi-3"], 1, add_generation_prompt=True)
    assert tokenize_conversation(asked, tokenizer, format_of(template, "phi-3"), 1, add_generation_prompt=True) == plain


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Weights of our own training, which bring no prompt template."""
    folder = tmp_path_factory.mktemp("trained")
    train(
        Recipe(
            train=[str(tiny / "train.json")],
            features=str(tiny / "features-patches"),
            preset="phi-patches",
            out=str(folder),
            max_steps=1,
            report_to=["none"],
        )
    )
    return folder


@pytest.fixture
def laid_out(trained, tmp_path):
    """The same weights with the prompt template of a project that adds a token."""
    preset = PRESETS["phi-patches"]
    model, _ = load_model(preset, trained, torch.float32)
    save_weights(model, tmp_path / "ours", replace(preset, prompt_template=PROJECTS["vandana1302238"].prompt_template))
    return tmp_path / "ours"


def test_weights_without_a_prompt_template_are_asked_as_before(tiny, trained):
    assert "picture_layout" not in json.loads((trained / "mmchat.json").read_text())
    engine = LocalEngine(PRESETS["phi-patches"], trained)
    asked = [Message("user", QUESTION, [tiny / "pictures" / "1.png"])]
    expected = tokenize_conversation(asked, engine.tokenizer, CHAT_FORMATS["phi-2"], 4, add_generation_prompt=True)
    assert engine.tokenize(asked) == expected


def test_a_prompt_template_is_kept_with_the_weights_and_followed(tiny, laid_out):
    preset, template = PRESETS["phi-patches"], PROJECTS["vandana1302238"].prompt_template
    assert preset_for_weights(preset, laid_out).prompt_template == template
    engine = LocalEngine(preset, laid_out)
    question = Message("user", QUESTION, [tiny / "pictures" / "1.png"])
    encoded = engine.tokenize([question])
    assert encoded.token_ids[:4] == [IMAGE_TOKEN_ID] * 4 and engine.tokenizer.decode(encoded.token_ids[-1]) == "[QA]"
    "".join(engine.reply([question], SamplingOptions(max_new_tokens=3)))


def test_training_goes_on_with_the_prompt_template_of_the_weights_it_starts_from(tiny, laid_out, tmp_path):
    recipe = Recipe(
        train=[str(tiny / "train.json")],
        features=str(tiny / "features-patches"),
        preset="phi-patches",
        start_from=str(laid_out),
        out=str(tmp_path / "run"),
        max_steps=1,
        report_to=["none"],
    )
    train(recipe)
    template = PROJECTS["vandana1302238"].prompt_template
    assert preset_for_weights(PRESETS["phi-patches"], tmp_path / "run").prompt_template == template
    chosen = chosen_preset(replace(recipe, image_encoder=str(tiny / "clip")))
    assert chat_format_of(chosen).prompt_template == template


def test_the_token_that_ends_an_answer_stops_the_model(tiny, trained, tmp_path):
    preset = PRESETS["phi-patches"]
    model, _ = load_model(preset, trained, torch.float32)
    save_weights(model, tmp_path, replace(preset, prompt_template=PromptTemplate(answer_end="<|im_end|>")))
    model, tokenizer = load_model(preset, tmp_path, torch.float32)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in model.language_model.generation_config.eos_token_id


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (7, "must be a mapping"),
        ({"question": "x", "turn_start": ""}, r"has unknown fields: question\."),
        ({"turn_start": 3}, "has a field of the wrong type. The texts of a prompt template are strings"),
        ({"picture_first": "no"}, "has a field of the wrong type. picture_first is true or false"),
    ],
)
def test_a_damaged_prompt_template_is_an_error(trained, laid_out, template, says):
    config = json.loads((laid_out / "mmchat.json").read_text())
    (laid_out / "mmchat.json").write_text(json.dumps({**config, "picture_layout": template}))
    with pytest.raises(WeightsError, match=f"The prompt template in the mmchat.json of 'ours' {says}"):
        LocalEngine(PRESETS["phi-patches"], laid_out)


def test_a_prompt_template_with_more_tokens_than_the_model_has_room_for_is_an_error(laid_out):
    config = json.loads((laid_out / "mmchat.json").read_text())
    config["picture_layout"]["added_tokens"] = [f"[{number}]" for number in range(9)]
    (laid_out / "mmchat.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="adds too many tokens"):
        load_model(PRESETS["phi-patches"], laid_out, torch.float32)
