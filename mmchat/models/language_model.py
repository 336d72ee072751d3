"""The causal language model of a preset, its tokenizer, and the LoRA adapter on it."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..device import choose_attention
from ..errors import AssetError, WeightsError, counted
from ..fetching import fetch
from ..fetching.cache import convert_once
from ..presets import LanguageModelPreset
from .chat_formats import CHAT_FORMATS
from .jinja_template import stop_ids
from .llava_folder import LANGUAGE_MODEL_NAMES, llava_template, load_part, open_llava

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def load_language_model(
    preset: LanguageModelPreset, dtype: torch.dtype, quantization: str = "none"
) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """Loads the frozen base model in evaluation mode, and its tokenizer.

    Args:
        quantization: one of ``device.QUANTIZATIONS`` except "auto". "4bit" is NF4 with ``dtype`` as the compute dtype
            (QLoRA, Dettmers et al. 2023, arXiv 2305.14314); "4bit-double" quantizes the scales, too; "8bit" is
            LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339).

    Raises:
        AssetError: the weights, or the packages that quantize them, are not available.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # loading takes a tenth of a second
    if preset.overflows_float16 and dtype == torch.float16:
        dtype = torch.bfloat16  # slower on GPUs that emulate it, but in float16 its attention overflows to NaN
    folder = model_folder(preset)
    tokenizer = _load_tokenizer(folder, preset.name)
    options = {"dtype": dtype, "attn_implementation": choose_attention()}
    options |= {} if quantization == "none" else _quantized(quantization, dtype)
    try:
        if preset.is_llava:
            return _load_llava_text(folder, preset.name, tokenizer, options), tokenizer
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    except ImportError as error:
        if quantization == "none":
            raise
        raise AssetError(
            f"{quantization} weights need two more packages: pip install accelerate bitsandbytes, or 'mmchat[gpu]'"
        ) from error
    model.generation_config.eos_token_id = stop_token_ids_of(preset, tokenizer)
    return model.requires_grad_(False).eval(), tokenizer


def stop_token_ids_of(preset: LanguageModelPreset, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The stop tokens, which the chat format knows; generation_config.json lists too few or too many."""
    return tokenizer.convert_tokens_to_ids(list(CHAT_FORMATS[preset.chat_format].stops))


def _load_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers and tokenizers raise many types
        trouble = "damaged" if (folder / TOKENIZER_FILE).exists() else "missing"
        raise WeightsError(
            f"The {TOKENIZER_FILE} of '{name}' is {trouble}: copy it from the model's origin."
        ) from error


def _load_llava_text(folder: Path, name: str, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]) -> nn.Module:
    """The language model in a LLaVA folder. The image token is added to its tokenizer if it is missing."""
    from transformers import AutoModelForCausalLM

    llava, template = open_llava(folder, name), llava_template(folder, name)
    model = load_part(
        llava, AutoModelForCausalLM, llava.config.text_config, LANGUAGE_MODEL_NAMES, "language model", **options
    )
    if template.image_token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [template.image_token]}, False)
    own = model.generation_config.eos_token_id
    own = [own] if isinstance(own, int) else own or []
    model.generation_config.eos_token_id = sorted({*own, *stop_ids(template, tokenizer)})
    return model.requires_grad_(False).eval()


def context_length(config: PreTrainedConfig) -> int:
    """The usable context length, in tokens.

    LongRoPE (Ding et al. 2024, arXiv 2402.13753), which Phi-3.5 has, switches to other scaling factors once a sequence
    exceeds the original context. That would invalidate the cached keys, so the context ends there.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    is_longrope = rope.get("rope_type") == "longrope" and original
    return min(config.max_position_embeddings, original) if is_longrope else config.max_position_embeddings


def has_layout(model: nn.Module, model_types: Collection[str], rope_types: Collection[str]) -> bool:
    """Whether a program that computes the usual layers of some model types can compute a model on the CPU.

    Args:
        model: the language model, with or without an adapter; it may be a stored one.
        model_types: transformers' names.
        rope_types: the rotary embeddings that the program has.
    """
    config = model.config
    return (
        config.model_type in model_types
        and all(weight.device.type == "cpu" and weight.is_floating_point() for weight in model.parameters())
        and config.hidden_act == ("gelu_new" if config.model_type == "phi" else "silu")
        and config.rope_parameters["rope_type"] in rope_types
        and not getattr(config, "qk_layernorm", False)
    )


def empty_language_model(preset: LanguageModelPreset) -> nn.Module:
    """The base model on the meta device: layers and shapes without weights, in no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_folder(preset)).get_text_config()
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).requires_grad_(False)


def model_folder(preset: LanguageModelPreset) -> Path:
    """The folder of the base model, fetched, and converted if it comes as a GGUF file."""
    if not preset.is_gguf:
        return fetch(preset.source)
    # "-1" is the version of _convert_gguf: raise it when its output changes
    return convert_once(f"{preset.name}-1", lambda target: _convert_gguf(preset, target))


def _quantized(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """Options that make transformers quantize weights on loading, on a GPU if there is one."""
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
    gpu = int(os.environ.get("LOCAL_RANK", 0))  # with DDP, each process has its own GPU
    return {"quantization_config": config, "device_map": {"": gpu}}


def _convert_gguf(preset: LanguageModelPreset, target: Path) -> None:
    """GGUF → safetensors and tokenizer.json: takes 20 s once; the result is memory-mapped in a fraction of a second."""
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
    """Adds a LoRA adapter with fresh weights (Hu et al. 2021, arXiv 2106.09685).

    Args:
        base_name: name of the base model, for the adapter's config.
        target_modules: names of the adapted layers; by default every linear layer except the output head.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, task_type="CAUSAL_LM"
    )
    adapted = _attach(model, config)
    config.base_model_name_or_path = base_name  # PEFT set the path of a cache folder
    return adapted


def _attach(model: nn.Module, config: LoraConfig) -> nn.Module:
    from peft import get_peft_model

    with warnings.catch_warnings():  # PEFT uses a property that transformers renamed
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def base_model(model: nn.Module) -> nn.Module:
    """The language model with its adapter layers, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def adapter_is_on(model: nn.Module) -> bool:
    """Whether the LoRA adapter of a language model is enabled; False if there is none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    return layer is not None and not layer.disable_adapters


def switch_adapter(model: nn.Module, on: bool) -> None:
    """Enables or disables the LoRA adapter of a language model, if it has one."""
    if hasattr(model, "peft_config") and on != adapter_is_on(model):
        model.base_model.enable_adapter_layers() if on else model.base_model.disable_adapter_layers()


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors with the names that PEFT's files use."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, save_embedding_layers=False)


def save_adapter_config(model: nn.Module, folder: Path) -> None:
    """Writes adapter_config.json, as PEFT does."""
    config = model.peft_config["default"].to_dict()
    config["inference_mode"] = True
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, default=_jsonable, sort_keys=True))


def _jsonable(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def load_adapter(model: nn.Module, folder: Path, *, trainable: bool = False) -> nn.Module:
    """Adds a saved adapter to the model. It stays separate from the base weights, so it can be disabled.

    Raises:
        WeightsError: the adapter is missing, damaged, or has another shape.
    """
    adapted = attach_adapter(model, folder, trainable=trainable)
    load_adapter_weights(adapted, folder)
    return adapted if trainable else adapted.eval()


def attach_adapter(model: nn.Module, folder: Path, *, trainable: bool = False) -> nn.Module:
    """Adds an adapter with the config of a saved one but fresh weights.

    Raises:
        WeightsError: the folder has no readable adapter config.
    """
    from peft import LoraConfig

    try:
        config = LoraConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise WeightsError(f"The adapter in '{folder.name}' is missing or cannot be read.") from error
    config.inference_mode = not trainable
    base_name, config.base_model_name_or_path = config.base_model_name_or_path, None  # so PEFT skips its check
    adapted = _attach(model, config)
    config.base_model_name_or_path = base_name
    return adapted


def load_adapter_weights(model: nn.Module, folder: Path) -> None:
    """Loads saved weights into the adapter of a model.

    Raises:
        WeightsError: the weights are missing, damaged, or have another shape.
    """
    try:
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"The adapter in '{folder.name}' is missing or cannot be read.") from error
    set_adapter_weights(model, tensors, folder.name)


def set_adapter_weights(model: nn.Module, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Loads tensors, named as in PEFT's files, into the adapter of a model.

    Args:
        name: name of their source, for error messages.

    Raises:
        WeightsError: tensors are missing, unexpected, or have another shape.
    """
    from peft import set_peft_model_state_dict

    try:
        if next(model.parameters()).is_meta:  # meta tensors cannot be copied into, so replace them
            named = {name.replace(".weight", ".default.weight"): tensor.clone() for name, tensor in tensors.items()}
            result = model.load_state_dict(named, strict=False, assign=True)
        else:
            result = set_peft_model_state_dict(model, tensors)
    except RuntimeError as error:
        raise WeightsError(f"The adapter in '{name}' was trained for a model of another shape.") from error
    missing = [key for key in result.missing_keys if "lora_" in key]
    if missing or result.unexpected_keys:
        raise WeightsError(
            f"The adapter in '{name}' does not fit: it lacks {counted(len(missing), 'tensor')} and has "
            f"{counted(len(result.unexpected_keys), 'unexpected tensor')}."
        )
