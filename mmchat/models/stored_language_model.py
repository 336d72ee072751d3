"""A language model whose weights stay on disk, because another program computes with a copy of its own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import nn

from ..presets import LanguageModelPreset
from .language_model import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    base_model,
    load_adapter,
    load_language_model,
    model_folder,
    stop_token_ids_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class StoredLanguageModel(nn.Module):
    """The settings and the token embeddings of a language model, which is not loaded.

    Its layers would need PEFT and transformers' models, whose import takes seconds and 250 MB. The embeddings are
    memory-mapped, so only those of tokens that occur are read.

    Args:
        preset: of a model that mmchat has converted, so that its files are known.
        adapter: the folder of the LoRA adapter, if it has one.
    """

    def __init__(self, preset: LanguageModelPreset, adapter: Path | None):
        super().__init__()
        self._preset, self.adapter = preset, adapter
        folder = model_folder(preset)
        self.config = SimpleNamespace(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
        self.tokenizer = _load_tokenizer(folder)
        self.generation_config = SimpleNamespace(eos_token_id=stop_token_ids_of(preset, self.tokenizer))
        with safe_open(folder / "model.safetensors", "pt") as file:
            self._embeddings = nn.Embedding.from_pretrained(file.get_tensor("model.embed_tokens.weight"))

    def get_input_embeddings(self) -> nn.Embedding:
        return self._embeddings

    def digest(self, with_adapter: bool) -> str:
        """Digest of the weights and settings, alone or with those of the adapter."""
        digest = hashlib.blake2b(model_folder(self._preset).name.encode(), digest_size=6)
        digest.update(self._preset.revision.encode())
        if with_adapter and self.adapter:
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                digest.update((self.adapter / name).read_bytes())
        return digest.hexdigest()

    def load(self) -> nn.Module:
        """The whole model in PyTorch.

        Raises:
            WeightsError: the adapter is missing, damaged, or has another shape.
        """
        model, _ = load_language_model(self._preset, torch.float32)
        model.generation_config.eos_token_id = self.generation_config.eos_token_id
        return load_adapter(model, self.adapter) if self.adapter else model


def has_adapter(model: nn.Module) -> bool:
    """Whether a language model, which may be a stored one, has a LoRA adapter."""
    return model.adapter is not None if isinstance(model, StoredLanguageModel) else hasattr(model, "peft_config")


def loaded(model: nn.Module) -> nn.Module:
    """The whole of a language model, which may be a stored one."""
    return model.load() if isinstance(model, StoredLanguageModel) else model


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer, without asking the model's configuration for its class, as ``AutoTokenizer`` does."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def weights_digest(model: nn.Module, merge: bool) -> str:
    """Digest of the config and weights: of the base model's only the first values, since hashing all would be slow."""
    if isinstance(model, StoredLanguageModel):
        return model.digest(merge)
    base = base_model(model)
    digest = hashlib.blake2b(base.config.to_json_string().encode(), digest_size=6)
    for name, weight in base.named_parameters():
        if "lora_" not in name:
            digest.update(weight.detach().flatten()[:64].float().numpy().tobytes())
        elif merge:
            digest.update(weight.detach().float().contiguous().numpy().tobytes())
    for module in base.modules() if merge else ():
        digest.update(repr(getattr(module, "scaling", "")).encode())
    return digest.hexdigest()
