"""A language model's config and weights in GGUF, llama.cpp's file format. The ``gguf`` package names the tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..errors import BadInput
from .language_model import context_length

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PreTrainedConfig

# transformers' model type -> gguf's name
ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "phi": "PHI2", "phi3": "PHI3"}
TYPES = {"f16": "F16", "q8_0": "Q8_0", "f32": "F32"}
LARGEST = 2**31 - 1

NamedTensor = tuple[str, torch.Tensor]


def language_model_writer(model: nn.Module, path: Path, *, short_rope: bool = False) -> GGUFWriter:
    """A writer for a file that holds a language model's config; tokenizer and tensors are left to the caller.

    Args:
        model: the language model without an adapter around it; its type is a key of ARCHITECTURES.
        short_rope: use LongRoPE's short factors at any length. llama.cpp chooses by the room for all sequences.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type].lower())
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("mmchat")  # at "phi-3" in a name, llama.cpp would expect that model's own vocabulary
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if config.model_type == "phi":
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(int(_head_size(config) * config.rope_parameters.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(model.get_input_embeddings().num_embeddings)
    if config.model_type == "phi3":
        writer.add_sliding_window(getattr(config, "sliding_window", None) or 0)
    if config.rope_parameters["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(LARGEST if short_rope else context_length(config))
        writer.add_rope_scaling_attn_factors(model.get_decoder().rotary_emb.attention_scaling)
    return writer


def _head_size(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def language_model_tensors(model: nn.Module, *, merge: bool = False) -> Iterator[NamedTensor]:
    """The weights of a language model with GGUF's names, one at a time.

    Args:
        model: the language model; a LoRA adapter may be in it, but not around it.
        merge: adds the adapter to the weights. Otherwise these are the base model's.

    Raises:
        BadInput: GGUF has no name for a tensor, or no place for a part of the adapter.
    """
    names, tied = tensor_names(model.config), model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if "lora_magnitude" in name:
            raise BadInput("An adapter with DoRA cannot be written to GGUF, which has no place for its magnitudes.")
        if "lora_" in name or (tied and name.startswith("lm_head")):
            continue
        layer, is_adapted, part = name.partition(".base_layer")
        if is_adapted and merge and part == ".weight":
            tensor = tensor + model.get_submodule(layer).get_delta_weight("default").to(tensor)
        yield gguf_name(names, layer + part), permuted(tensor, layer + part, model.config)
    yield from _rope_factors(model.config)


def _rope_factors(config: PreTrainedConfig) -> Iterator[NamedTensor]:
    rope = config.rope_parameters
    if rope.get("rope_type") == "longrope":
        for kind in ("long", "short"):
            yield f"rope_factors_{kind}.weight", torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)


def tensor_names(config: PreTrainedConfig) -> Any:
    """gguf's map from the names of transformers to those of GGUF."""
    import gguf

    architecture = getattr(gguf.MODEL_ARCH, ARCHITECTURES[config.model_type])
    return gguf.get_tensor_name_map(architecture, config.num_hidden_layers)


def gguf_name(names: Any, name: str) -> str:
    """The GGUF name of a tensor.

    Raises:
        BadInput: there is none.
    """
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if not found:
        raise BadInput(f"GGUF has no name for the tensor '{name}' of this text model.")
    return str(found)


def permuted(tensor: torch.Tensor, name: str, config: PreTrainedConfig) -> torch.Tensor:
    """Llama's queries and keys in the order of llama.cpp's rotary embedding, which pairs neighbors, not halves."""
    if ARCHITECTURES[config.model_type] != "LLAMA" or not any(part in name for part in ("q_proj", "k_proj")):
        return tensor
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])  # [heads, 2, half, …]
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def add_tensor(writer: GGUFWriter, name: str, tensor: torch.Tensor, kind: str) -> None:
    """Adds a tensor in a number format of TYPES, or in the next larger one that can hold it."""
    writer.add_tensor(name, _quantized(name, tensor, kind), raw_dtype=_format_of(name, tensor, kind))


def _quantized(name: str, tensor: torch.Tensor, kind: str) -> np.ndarray:
    import gguf

    values = tensor.detach().float().contiguous().numpy()
    quantized: np.ndarray = gguf.quants.quantize(values, _format_of(name, tensor, kind))
    return quantized


def _format_of(name: str, tensor: torch.Tensor, kind: str) -> GGMLQuantizationType:
    import gguf

    if tensor.ndim == 1 or name.startswith("rope_factors"):
        kind = "f32"
    elif kind == "q8_0" and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]:
        kind = "f16"
    found: GGMLQuantizationType = getattr(gguf.GGMLQuantizationType, TYPES[kind])
    return found


def finish(writer: GGUFWriter) -> None:
    """Writes everything that was added, and closes the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.inference_mode()
def write_language_model(writer: GGUFWriter, model: nn.Module, kind: str, *, merge: bool = False) -> None:
    """Writes what was added and a language model's weights, one by one, so they are never in memory together.

    Args:
        kind: a number format of TYPES.
        merge: adds the adapter to the weights.
    """
    import gguf

    for name, tensor in language_model_tensors(model):  # merging changes no shape
        quantization = _format_of(name, tensor, kind)
        values, size = gguf.GGML_QUANT_SIZES[quantization]
        writer.add_tensor_info(name, tensor.shape, np.dtype("float32"), tensor.numel() // values * size, quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in language_model_tensors(model, merge=merge):
        writer.write_tensor_data(_quantized(name, tensor, kind))
    writer.close()
