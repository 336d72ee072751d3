"""Small models of the real classes, built from configs, with a preset for each. The real models run the same code.

``python -m tests.tiny FOLDER script.py …`` runs a training script that knows these presets.
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from mmchat.models.language_model import add_adapter, load_language_model
from mmchat.presets import PRESETS, SMOL, HubRepository, ImageEncoderPreset, LanguageModelPreset, ProjectorPreset
from mmchat.training.data.llava_json import entry_of, write_conversations

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PHI_3_SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_FORMATS = {"phi3": "phi-3", "phi": "phi-2", "llama": "smollm2"}
SPARE_ROWS = {"phi3": 0, "phi": 8, "llama": 0}  # embeddings beyond the tokenizer's words, as Phi-2 has 905
TEXT = ["<image> What is in this picture? Is there a dog? Yes. No. A brown dog runs on the grass. Describe the image."]
WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # large, so a frozen output head can tell tokens apart
}
CLIP_WIDTHS = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


def make(folder: Path) -> None:
    """Writes the models; a few hundred kilobytes."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        LlamaConfig,
        LlamaForCausalLM,
        Phi3Config,
        Phi3ForCausalLM,
        PhiConfig,
        PhiForCausalLM,
        PreTrainedTokenizerFast,
        SiglipImageProcessorPil,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    torch.manual_seed(0)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(TEXT, vocab_size=400, special_tokens=SPECIAL)
    special = [*SPECIAL, *(AddedToken(token, rstrip=True, special=True) for token in PHI_3_SPECIAL)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<|im_end|>", additional_special_tokens=special
    )
    for name, config_class, model_class in (
        ("phi3", Phi3Config, Phi3ForCausalLM),
        ("phi", PhiConfig, PhiForCausalLM),
        ("llama", LlamaConfig, LlamaForCausalLM),
    ):
        model = model_class(config_class(vocab_size=len(tokenizer) + SPARE_ROWS[name], **WIDTHS))
        if name == "llama":
            round_weights(model)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    clip = CLIPVisionConfig(**CLIP_WIDTHS, projection_dim=20)
    CLIPVisionModelWithProjection(clip).save_pretrained(folder / "clip")
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder / "clip")
    SiglipVisionModel(SiglipVisionConfig(**CLIP_WIDTHS)).save_pretrained(folder / "siglip")
    SiglipImageProcessorPil(size=size).save_pretrained(folder / "siglip")


def make_longrope(folder: Path, tokenizer: Any) -> nn.Module:
    """Writes a Phi-3 model whose rotary factors change after 512 of 2,048 tokens, as in Phi-3.5; returns it."""
    from transformers import Phi3Config, Phi3ForCausalLM

    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 512, **factors}
    torch.manual_seed(0)
    config = Phi3Config(vocab_size=len(tokenizer), original_max_position_embeddings=512, rope_parameters=rope, **WIDTHS)
    model = Phi3ForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def phi_3_tokenizer(text: list[str], template: str | None = None) -> Any:
    """A tokenizer built as Phi-3.5's is: SentencePiece's space in front, special tokens that swallow what follows."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *bytes_])
    tokenizer.train_from_iterator(text, trainer)
    names = ("<|endoftext|>", "<|assistant|>", "<|end|>", "<|system|>", "<|user|>")
    tokenizer.add_special_tokens(
        [AddedToken(name, rstrip=name != "<|endoftext|>", normalized=False, special=True) for name in names]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", chat_template=template)


@torch.no_grad()
def round_weights(model: nn.Module) -> None:
    """Rounds linear layers to 16 levels per block of 32 weights and the head to 255, as in a GGUF file of type Q4_1."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            blocks = layer.weight.view(len(layer.weight), -1, 32)
            lowest, highest = blocks.aminmax(dim=2, keepdim=True)
            step, zero = (highest - lowest) / 15, lowest
            if name == "lm_head":
                step, zero = blocks.abs().amax(dim=2, keepdim=True) / 127, 0
            layer.weight.copy_(((blocks - zero) / step).round().mul(step).add(zero).view_as(layer.weight))


def make_data(folder: Path) -> None:
    """Twelve pictures of four colors each, and conversations of several lengths about them."""
    pictures = folder / "pictures"
    pictures.mkdir()
    entries = []
    for number in range(12):
        blocks = Image.fromarray(np.random.default_rng(number).integers(0, 255, (2, 2, 3), dtype=np.uint8))
        blocks.resize((40, 32), Image.Resampling.NEAREST).save(pictures / f"{number}.png")
        for turns in range(1, 2 + number % 3):
            asked = [("Describe the image.", f"A brown dog {'runs ' * (number % 4 + 1)}on grass {number}.")]
            asked += [("Is there a dog?", "Yes." if number % 2 else "No.")] * (turns - 1)
            entries.append(entry_of(f"{number}-{turns}", f"{number}.png", asked))
    write_conversations(folder / "train.json", entries)
    write_conversations(folder / "eval.json", entries[:6])


def presets(folder: Path) -> dict:
    """Presets of the models in ``folder``: each language model with CLIP's patches or its pooled embedding."""
    found = {}
    encoders = {
        "patches": ImageEncoderPreset("tiny-clip", HubRepository(str(folder / "clip")), 32, "patches", 4, 24),
        "pooled": ImageEncoderPreset("tiny-clip", HubRepository(str(folder / "clip")), 32, "pooled", 1, 20),
    }
    for name, chat_format in CHAT_FORMATS.items():
        for kind, encoder in encoders.items():
            found[f"{name}-{kind}"] = replace(
                SMOL,
                name=f"{name}-{kind}",
                language_model=LanguageModelPreset(f"tiny-{name}", HubRepository(str(folder / name)), chat_format, 0),
                image_encoder=encoder,
                projector=ProjectorPreset("mlp", 40),
            )
    return found


def adapted_model(preset: str) -> nn.Module:
    """The small language model of a preset, with a LoRA adapter that changes its logits."""
    model, _ = load_language_model(PRESETS[preset].language_model, torch.float32)
    model = add_adapter(model, rank=4, alpha=8, dropout=0.0, base_name="tiny")
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    return model.eval()


if __name__ == "__main__":
    PRESETS.update(presets(Path(sys.argv[1])))
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
