"""Weights → a standard LLaVA model, which transformers, vLLM and other engines serve without mmchat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..conversation import ROLES
from ..errors import BadInput
from ..fetching import fetch
from ..models.chat_formats import CHAT_FORMATS, ChatFormat
from ..models.language_model import context_length
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
    4-bit weights would round the adapter away.

    Args:
        weights: a folder that training wrote.
        dtype: the number format of the exported weights.

    Raises:
        BadInput: LLaVA has no place for a part of it; the sentence names the part.
        MmchatError: the weights or the base model cannot be had.
    """
    preset = preset_for_weights(preset, weights)
    model, tokenizer = load_model(preset, weights, torch.float32)
    _check(model, preset)
    if model.has_adapter:
        model.language_model = model.language_model.merge_and_unload()
    language_model = model.causal_language_model
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_token_id >= language_model.get_input_embeddings().num_embeddings:
        language_model.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
    rotary = getattr(language_model.get_decoder(), "rotary_emb", None)
    _keep_short_factors(language_model.config, getattr(rotary, "attention_scaling", None))
    llava = _assemble(model, preset.image_encoder, image_token_id)
    llava.generation_config = language_model.generation_config
    llava.to(dtype).save_pretrained(out, state_dict=_named_for_engines(llava), save_original_format=False)
    _processor(tokenizer, preset).save_pretrained(out)


def _check(model: VisionLanguageModel, preset: Preset) -> None:
    config, encoder = model.projector_config, preset.image_encoder
    head = model.causal_language_model.get_output_embeddings()
    troubles = {
        f"features of the kind '{encoder.features}', where it takes patches": encoder.features != "patches",
        f"a projector of the kind '{config.kind}', where it takes 'llava'": config.kind != "llava",
        "a hidden width other than the tokens' in the projector": config.intermediate_size != config.hidden_size,
        "a marker token": config.end_of_image_token,
        "another LLaVA model, which they were trained on": preset.language_model.is_llava,
        "a picture layout of their own": preset.prompt_template is not None,
        "a bias in the output layer, as Phi-2 has": getattr(head, "bias", None) is not None,
    }
    found = [trouble for trouble, is_there in troubles.items() if is_there]
    if found:
        raise BadInput(f"These weights cannot be exported: LLaVA has no place for {'; nor for '.join(found)}.")


def _assemble(model: VisionLanguageModel, encoder: ImageEncoderPreset, image_token_id: int) -> nn.Module:
    """The LLaVA model around our parts, none of which is copied."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    folder, vision_config = vision_of(encoder)
    language_model = model.causal_language_model
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=language_model.config,
        image_token_index=image_token_id,
        image_seq_length=encoder.feature_count,
        vision_feature_layer=encoder.layer,
        vision_feature_select_strategy="default" if _drops_class_token(encoder, vision_config) else "full",
    )
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower = type(llava.model.vision_tower).from_pretrained(folder, dtype=torch.float32)
    llava.model.multi_modal_projector.load_state_dict(model.projector.state_dict(), assign=True)
    llava.model.language_model = language_model.get_decoder()
    llava.lm_head = language_model.get_output_embeddings()
    return llava


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


def _drops_class_token(encoder: ImageEncoderPreset, vision_config: Any) -> bool:
    return vision_config.model_type.startswith("clip") and not encoder.class_token


def _processor(tokenizer: Any, preset: Preset) -> Any:
    """What turns messages and pictures into the model's inputs."""
    from transformers import AutoImageProcessor, LlavaProcessor

    encoder = preset.image_encoder
    folder, vision_config = vision_of(encoder)
    is_clip = vision_config.model_type.startswith("clip")
    chat_format = CHAT_FORMATS[preset.language_model.chat_format]
    tokenizer.chat_template = chat_template(chat_format)
    tokenizer.eos_token = chat_format.stops[0]
    return LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(folder, backend="pil"),
        tokenizer=tokenizer,
        patch_size=vision_config.patch_size,
        vision_feature_select_strategy="default" if _drops_class_token(encoder, vision_config) else "full",
        chat_template=chat_template(chat_format),
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=int(is_clip),  # the class token
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
