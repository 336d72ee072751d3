"""The tokenizer and the causal language model of a preset, and the LoRA adapter on it."""

from __future__ import annotations

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..device import choose_attention
from ..errors import AssetError, WeightsError
from ..fetching import fetch
from ..fetching.cache import convert_once
from ..presets import LanguageModelPreset
from .prompt import CHAT_FORMATS

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def load_language_model(
    preset: LanguageModelPreset, dtype: torch.dtype, quantization: str = "none"
) -> tuple[nn.Module, Any]:
    """The frozen base model in evaluation mode, and its tokenizer.

    Args:
        quantization: a kind of ``device.QUANTIZATIONS`` but "auto". "4bit" is NF4 (Dettmers et al. 2023, QLoRA,
            arXiv 2305.14314), computed with in ``dtype``; "4bit-double" quantises its scales, too; "8bit" is LLM.int8
            (arXiv 2208.07339).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would run for a tenth of a second
    if preset.overflows_float16 and dtype == torch.float16:
        dtype = torch.bfloat16  # slower on a card that only emulates it, but its attention gives numbers
    folder = _model_folder(preset)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {} if quantization == "none" else _quantized(quantization, dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=choose_attention(), **options
        )
    except ImportError as error:
        if quantization == "none":
            raise
        raise AssetError(
            f"Weights in {quantization} need two more packages: pip install accelerate bitsandbytes"
        ) from error
    # What ends an answer is the chat format's business: generation_config.json lists too little or too much.
    stops = CHAT_FORMATS[preset.chat_format].stops
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(stops))
    return model.requires_grad_(False).eval(), tokenizer


def context_length(config: Any) -> int:
    """How many tokens a language model reads with the same rotary factors.

    longrope (Ding et al. 2024, arXiv 2402.13753), which Phi-3.5 has, takes other factors for every position once a
    sequence is longer than the original context. Keys that were kept until then no longer fit, so we stay below.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    is_longrope = rope.get("rope_type") == "longrope" and original
    return min(config.max_position_embeddings, original) if is_longrope else config.max_position_embeddings


def empty_language_model(preset: LanguageModelPreset) -> nn.Module:
    """The base model without its weights, on the meta device: its layers and their shapes, in no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(_model_folder(preset))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).requires_grad_(False)


def _model_folder(preset: LanguageModelPreset) -> Path:
    if not preset.source.name.endswith(".gguf"):
        return fetch(preset.source)
    # "-1" is the version of the conversion below: raise it when what it writes changes
    return convert_once(f"{preset.name}-1", lambda target: _convert_gguf(preset, target))


def _quantized(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """What makes transformers quantise weights as it loads them; on a GPU, if there is one."""
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=kind == "4bit-double",
        )
    if not torch.cuda.is_available():
        return {"quantization_config": config}
    own = int(os.environ.get("LOCAL_RANK", 0))  # of several processes each has its own GPU
    return {"quantization_config": config, "device_map": {"": own}}


def _convert_gguf(preset: LanguageModelPreset, target: Path) -> None:
    """GGUF → safetensors and tokenizer.json: read once in 20 s, then mapped into memory in a fraction of a second."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = fetch(preset.source)
    logger.info("Converting %s once; this takes about half a minute", source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def add_adapter(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    base_name: str,
    target_modules: str | list[str] = "all-linear",
) -> nn.Module:
    """A fresh LoRA adapter (Hu et al. 2021, arXiv 2106.09685).

    Args:
        target_modules: names of layers; if not told, every linear layer but the output head.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, task_type="CAUSAL_LM"
    )
    adapted = _attach(model, config)
    config.base_model_name_or_path = base_name  # PEFT put the path of a cache folder there
    return adapted


def _attach(model: nn.Module, config: Any) -> nn.Module:
    from peft import get_peft_model

    with warnings.catch_warnings():  # PEFT calls a property that transformers has renamed
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def adapter_is_on(model: nn.Module) -> bool:
    """Whether a LoRA adapter takes part in what a language model computes; False if it has none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    return layer is not None and not layer.disable_adapters


def switch_adapter(model: nn.Module, on: bool) -> None:
    """Switches the LoRA adapter of a language model on or off, if it has one and it is not so already."""
    if hasattr(model, "peft_config") and on != adapter_is_on(model):
        model.base_model.enable_adapter_layers() if on else model.base_model.disable_adapter_layers()


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors, under the names that PEFT's own files have."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)


def save_adapter_config(model: nn.Module, folder: Path) -> None:
    """Writes what the adapter is built from, as PEFT does."""
    config = model.peft_config["default"].to_dict()
    config["inference_mode"] = True
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, default=_jsonable, sort_keys=True))


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def load_adapter(model: nn.Module, folder: Path, *, trainable: bool = False) -> nn.Module:
    """Puts a saved adapter on the model; it stays separate from the base weights, so it can be switched off.

    Raises:
        WeightsError: the adapter is missing or was made for a model of another shape.
    """
    adapted = attach_adapter(model, folder, trainable=trainable)
    load_adapter_weights(adapted, folder)
    return adapted if trainable else adapted.eval()


def attach_adapter(model: nn.Module, folder: Path, *, trainable: bool = False) -> nn.Module:
    """The model with an adapter of a saved one's shape, but with fresh weights.

    Raises:
        WeightsError: the folder does not describe an adapter.
    """
    from peft import LoraConfig

    try:
        config = LoraConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise WeightsError(f"The adapter in '{folder.name}' is missing or cannot be read.") from error
    config.inference_mode = not trainable
    base_name, config.base_model_name_or_path = config.base_model_name_or_path, None  # nothing for PEFT to compare
    adapted = _attach(model, config)
    config.base_model_name_or_path = base_name
    return adapted


def load_adapter_weights(model: nn.Module, folder: Path) -> None:
    """Puts saved weights into the adapter a model already has.

    Raises:
        WeightsError: they are missing, damaged, or of another shape.
    """
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"The adapter in '{folder.name}' is missing or cannot be read.") from error
    set_adapter_weights(model, tensors, folder.name)


def set_adapter_weights(model: nn.Module, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Puts weights, under the names of PEFT's files, into the adapter a model already has.

    Args:
        name: of where they come from, for messages.

    Raises:
        WeightsError: they are not all there, or of another shape.
    """
    from peft import set_peft_model_state_dict

    try:
        if next(model.parameters()).is_meta:  # nothing to copy into, so the tensors take the place of its own
            named = {name.replace(".weight", ".default.weight"): tensor.clone() for name, tensor in tensors.items()}
            result = model.load_state_dict(named, strict=False, assign=True)
        else:
            result = set_peft_model_state_dict(model, tensors)
    except RuntimeError as error:
        raise WeightsError(f"The adapter in '{name}' was made for a model of another shape.") from error
    missing = [key for key in result.missing_keys if "lora_" in key]
    if missing or result.unexpected_keys:
        raise WeightsError(
            f"The adapter in '{name}' does not fit: {len(missing)} tensors are missing and "
            f"{len(result.unexpected_keys)} have no place."
        )
