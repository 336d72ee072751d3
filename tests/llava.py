"""Tiny LLaVA models with random weights, written by transformers, as reference and as weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import CLIP_WIDTHS, WIDTHS

PARTS_TEMPLATE = (  # as llava-hf's: pictures first, then text
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
STRING_TEMPLATE = (  # as Phi-3-mini-4k's, which knows strings only
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '<|end|>' + '\n' }}{% endif %}{% endfor %}"
)
TEXT_MODELS = {"phi3": "Phi3", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}


def make(
    folder: Path,
    tokenizer_folder: Path,
    text: str = "phi3",
    tower: str = "clip",
    template: str = PARTS_TEMPLATE,
    **settings: Any,
) -> Path:
    """Writes a LLaVA folder.

    Args:
        tokenizer_folder: a model whose tokenizer it takes.
        settings: of ``LlavaConfig``; ``max_shard_size`` of the files.
    """
    import transformers
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        SiglipImageProcessorPil,
        SiglipVisionConfig,
    )

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, False)
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
    shard_size = settings.pop("max_shard_size", "5GB")
    is_clip = tower == "clip"
    vision = (CLIPVisionConfig if is_clip else SiglipVisionConfig)(**CLIP_WIDTHS)
    config = LlavaConfig(
        vision_config=vision,
        text_config=getattr(transformers, f"{TEXT_MODELS[text]}Config")(vocab_size=len(tokenizer), **WIDTHS),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **settings,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.model.multi_modal_projector.parameters():
            weight.normal_(0, 0.3)
        for weight in model.model.vision_tower.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 0]
    model.save_pretrained(folder, max_shard_size=shard_size)
    size = {"height": 32, "width": 32}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
        if is_clip
        else SiglipImageProcessorPil(size=size),
        tokenizer=tokenizer,
        patch_size=CLIP_WIDTHS["patch_size"],
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(is_clip),
        chat_template=template,
    ).save_pretrained(folder)
    return folder
