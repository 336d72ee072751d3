"""Weights → a standard LLaVA model, which transformers, vLLM and other engines serve without mmchat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..conversation import ROLES
from ..errors import BadInput
from ..fetching import fetch
from ..folders import empty_folder
from ..models.chat_formats import CHAT_FORMATS, ChatFormat
from ..models.image_encoder import llava_image_encoder, load_image_processor
from ..models.language_model import context_length
from ..models.llava_folder import is_llava_folder, open_llava
from ..models.vision_language_model import VisionLanguageModel
from ..presets import ImageEncoderPreset, Preset
from .weights_folder import load_model, preset_for_weights

IMAGE_TOKEN = "<image>"
ENGINE_NAMES = {  # how transformers' names begin -> those of published LLaVA checkpoints, which vLLM's loader expects
    "model.vision_tower.vision_model.": "vision_tower.vision_model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def export_llava(weights: str | Path, out: str | Path, preset: Preset, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a ``LlavaForConditionalGeneration`` folder with its processor and chat template.

    The adapter is merged into a fresh copy of the base model in 32 bits, and the sum is rounded once: merging into
    4-bit weights would round the adapter away. Weights that were trained on a LLaVA model keep its configuration and
    its chat template.

    Args:
        weights: a folder that training wrote.
        out: the folder to write; it must be empty.
        dtype: the number format of the exported weights.

    Raises:
        BadInput: LLaVA has no place for a part of it; the sentence names the part. Or ``out`` is not empty.
        MmchatError: the weights or the base model are not available.
    """
    out = empty_folder(out)
    preset = preset_for_weights(preset, weights)
    model, tokenizer = load_model(preset, weights, torch.float32)
    _check(model, preset)
    if model.has_adapter:
        model.language_model = model.language_model.merge_and_unload()
    language_model = model.unwrapped_language_model
    image_token = preset.chat_template.image_token if preset.chat_template else IMAGE_TOKEN
    if image_token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
    image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    if image_token_id >= language_model.get_input_embeddings().num_embeddings:
        language_model.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
    rotary = getattr(language_model.get_decoder(), "rotary_emb", None)
    _keep_short_factors(language_model.config, getattr(rotary, "attention_scaling", None))
    llava = _assemble(model, preset, image_token_id)
    llava.generation_config = language_model.generation_config
    llava.to(dtype).save_pretrained(out, state_dict=_named_for_engines(llava), save_original_format=False)
    _processor(tokenizer, preset).save_pretrained(out)


def _check(model: VisionLanguageModel, preset: Preset) -> None:
    config, encoder = model.projector_config, preset.image_encoder
    head = model.unwrapped_language_model.get_output_embeddings()
    troubles = {
        f"features of the kind '{encoder.features}', where it takes patches": encoder.features != "patches",
        f"a projector of the kind '{config.kind}', where it takes 'llava'": config.kind != "llava",
        "a projector whose intermediate and hidden sizes differ": config.intermediate_size != config.hidden_size,
        "an end-of-image token": config.end_of_image_token,
        "a prompt template of their own": preset.prompt_template is not None,
        "a bias in the output layer, as Phi-2 has": getattr(head, "bias", None) is not None,
    }
    found = [trouble for trouble, is_there in troubles.items() if is_there]
    if found:
        raise BadInput(f"These weights cannot be exported: LLaVA has no place for {'; nor for '.join(found)}.")


def _assemble(model: VisionLanguageModel, preset: Preset, image_token_id: int) -> nn.Module:
    """The LLaVA model around our parts, none of which is copied."""
    from transformers import LlavaForConditionalGeneration

    language_model = model.unwrapped_language_model
    config = _config(preset, image_token_id, language_model.config)
    for part in (config, config.text_config, config.vision_config):
        part.name_or_path = ""  # a folder of this machine
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower = image_network(preset.image_encoder, type(llava.model.vision_tower))
    llava.model.multi_modal_projector.load_state_dict(model.projector.state_dict(), assign=True)
    llava.model.language_model = language_model.get_decoder()
    llava.lm_head = language_model.get_output_embeddings()
    return llava


def _config(preset: Preset, image_token_id: int, text_config: Any) -> Any:
    """The configuration of the LLaVA model: that of the one that the weights were trained on, or a new one."""
    from transformers import LlavaConfig

    if preset.language_model.is_llava:
        config = open_llava(fetch(preset.language_model.source), preset.language_model.name).config
        config.text_config = text_config
        return config
    encoder, vision_config = preset.image_encoder, vision_of(preset.image_encoder)[1]
    return LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_token_id,
        image_seq_length=encoder.feature_count,
        vision_feature_layer=encoder.layer,
        vision_feature_select_strategy=_select_strategy(encoder, vision_config),
    )


def image_network(encoder: ImageEncoderPreset, model_class: Any) -> nn.Module:
    """An image encoder in fp32, without the rest of its contrastive or LLaVA model."""
    folder = fetch(encoder.source)
    if is_llava_folder(folder):
        return llava_image_encoder(folder, encoder.name)[1]
    return model_class.from_pretrained(folder, dtype=torch.float32)


def _named_for_engines(llava: nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors under the names that both transformers and vLLM load."""
    named = {}
    for name, tensor in llava.state_dict().items():
        if name.startswith("lm_head.") and llava.config.text_config.tie_word_embeddings:
            continue  # the embeddings serve as the head
        start = next(start for start in ENGINE_NAMES if name.startswith(start))
        named[ENGINE_NAMES[start] + name.removeprefix(start)] = tensor
    return named


def _keep_short_factors(config: Any, scaling: float | None) -> None:
    """Bounds a longrope model to the context of its short rotary factors, as in chat.

    vLLM takes the long factors for every position once its context may exceed the original one. The attention factor
    follows from the ratio of both contexts, so it is written out before the ratio changes: under the name that
    transformers reads, and under the two that vLLM reads.
    """
    length = context_length(config)
    if length < config.max_position_embeddings and scaling is not None:
        names = ("attention_factor", "short_mscale", "long_mscale")
        config.rope_parameters = {**config.rope_parameters, **dict.fromkeys(names, scaling)}
        config.max_position_embeddings = length


def vision_of(encoder: ImageEncoderPreset) -> tuple[Path, Any]:
    """Where the image encoder lies, and the configuration of its image half."""
    from transformers import AutoConfig

    folder = fetch(encoder.source)
    config = AutoConfig.from_pretrained(folder)
    return folder, getattr(config, "vision_config", config)


def _select_strategy(encoder: ImageEncoderPreset, vision_config: Any) -> str:
    """LLaVA's word for whether the first feature is left out."""
    is_clip = vision_config.model_type.startswith("clip")
    return "default" if encoder.drops_patch or (is_clip and not encoder.class_token) else "full"


def _processor(tokenizer: Any, preset: Preset) -> Any:
    """What turns messages and pictures into the model's inputs."""
    from transformers import LlavaProcessor

    encoder, template = preset.image_encoder, preset.chat_template
    vision_config = vision_of(encoder)[1]
    if template:
        text = template.text
    else:
        chat_format = CHAT_FORMATS[preset.language_model.chat_format]
        text = chat_template(chat_format)
        tokenizer.eos_token = chat_format.stops[0]
    tokenizer.chat_template = text
    return LlavaProcessor(
        image_processor=load_image_processor(encoder),
        tokenizer=tokenizer,
        patch_size=vision_config.patch_size,
        vision_feature_select_strategy=_select_strategy(encoder, vision_config),
        chat_template=text,
        image_token=template.image_token if template else IMAGE_TOKEN,
        num_additional_image_tokens=int(vision_config.model_type.startswith("clip")),  # the class token
    )


def chat_template(chat_format: ChatFormat) -> str:
    """The format as the Jinja template of transformers, for text and for lists of text and pictures."""

    def of_role(texts: Any) -> str:
        cases = "".join(
            f"{'el' * (role != ROLES[0])}if r == {role!r} %}}{{{{ {texts[role]!r} }}}}{{% " for role in ROLES
        )
        return f"{{% {cases}endif %}}"

    after, before = chat_format.after_image, chat_format.before_text
    return (
        "{% for message in messages %}{% set r = message['role'] %}"
        + of_role(chat_format.turn_start)
        + "{% if message['content'] is string %}"
        + f"{{{{ {before!r} + message['content'] }}}}"
        + "{% else %}"
        + "{% for part in message['content'] if part['type'] == 'image' %}"
        + f"{{{{ {IMAGE_TOKEN + after!r} }}}}"
        + "{% endfor %}"
        + f"{{{{ {before!r} }}}}"
        + "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
        + of_role(chat_format.turn_end)
        + f"{{{{ {chat_format.between_turns!r} }}}}"
        + "{% endfor %}"
        + "{% if add_generation_prompt %}"
        + f"{{{{ {chat_format.turn_start['assistant']!r} }}}}"
        + "{% endif %}"
    )
