"""Weights → GGUF files for llama.cpp and programs built on it: the text model, the adapter, and the image part.

The tensor names come from the ``gguf`` package; llama.cpp's loader (tools/mtmd/clip.cpp) defines what the image part
("mmproj") may hold: the patches of CLIP or SigLIP after one layer, then Linear → GELU → Linear. A question without a
picture uses the adapter there, too, unless the request switches it off.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BadInput, MmchatError
from ..folders import empty_folder
from ..models.chat_formats import chat_format_of
from ..models.gguf_tensors import (
    ARCHITECTURES,
    add_tensor,
    finish,
    gguf_name,
    language_model_writer,
    permuted,
    tensor_names,
    write_language_model,
)
from ..models.image_encoder import load_image_processor
from ..models.vision_language_model import VisionLanguageModel
from ..presets import ImageEncoderPreset, Preset
from .gguf_tokenizer import add_tokenizer, gguf_template
from .llava_export import image_network, vision_of
from .weights_folder import load_model, preset_for_weights

EXPORTED = ("llama", "mistral", "phi3")  # model types whose answers in llama.cpp are tested; Phi-2's are others there
GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh")
Q4_K_M = "q4_k_m"  # the gguf package cannot write it
QUANTIZER = "llama-quantize"  # llama.cpp's program, which can


@dataclass(frozen=True)
class Exported:
    """The files that were written; None where the weights have no such part.

    ``notes`` say why, and how the result differs from the request or from mmchat.
    """

    model: Path
    adapter: Path | None
    mmproj: Path | None
    notes: tuple[str, ...] = ()


def export_gguf(
    weights: str | Path, out: str | Path, preset: Preset, kind: str = "f16", merge: bool = False
) -> Exported:
    """Writes ``model.gguf``, ``adapter.gguf`` (LoRA) and ``mmproj.gguf`` (image encoder and projector).

    Args:
        weights: a folder that training wrote, or a LLaVA model.
        out: the folder to write; it must be empty.
        kind: the number format of the text model's matrices, a key of TYPES or Q4_K_M, which becomes q8_0 where
            llama.cpp's quantizer is not installed. The adapter is f32, and ``mmproj.gguf`` f16 unless this is f32.
        merge: add the adapter to the text model instead of writing it beside.

    Raises:
        BadInput: llama.cpp has no place for a part of it; the sentence names the part. Or ``out`` is not empty.
        MmchatError: the weights or the base model are not available, or llama.cpp's quantizer failed.
    """
    folder, notes = empty_folder(out), list[str]()
    quantizer = shutil.which(QUANTIZER) if kind == Q4_K_M else None
    if kind == Q4_K_M and not quantizer:
        kind = "q8_0"
        notes.append(f"model.gguf is q8_0, since llama.cpp's {QUANTIZER} is not on the PATH.")
    preset = preset_for_weights(preset, weights)
    model, tokenizer = load_model(preset, weights, torch.float32)
    model_type = model.unwrapped_language_model.config.model_type
    if model_type not in EXPORTED:
        raise BadInput(
            f"A text model of the type '{model_type}' cannot be exported to GGUF; these can: {', '.join(EXPORTED)}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    reason = _why_no_mmproj(model, preset)
    adapter = model.has_adapter and not merge
    unquantized = folder / ("model-f16.gguf" if quantizer else "model.gguf")
    _write_text(model.unwrapped_language_model, tokenizer, preset, unquantized, "f16" if quantizer else kind, merge)
    if quantizer:
        _quantize(quantizer, unquantized, folder / "model.gguf")
    if adapter:
        _write_adapter(model, folder / "adapter.gguf")
    if reason:
        notes.append(f"No mmproj.gguf: {reason}.")
    else:
        _write_mmproj(model, preset.image_encoder, folder / "mmproj.gguf", kind)
        if _is_clip(preset.image_encoder):
            notes.append("llama.cpp reads CLIP's patches one position off, so answers about pictures may differ there.")
    return Exported(
        folder / "model.gguf",
        folder / "adapter.gguf" if adapter else None,
        None if reason else folder / "mmproj.gguf",
        tuple(notes),
    )


def _why_no_mmproj(model: VisionLanguageModel, preset: Preset) -> str:
    """Why llama.cpp cannot see as these weights do; empty if it can."""
    encoder, config = preset.image_encoder, model.projector_config
    if encoder.features == "pooled":
        return f"these weights read the pooled embedding of {encoder.name}, and llama.cpp projects patches only"
    if encoder.features != "patches":
        return f"llama.cpp has no image encoder like {encoder.name}, so it gets the text model and the adapter only"
    if not vision_of(encoder)[1].model_type.startswith(("clip", "siglip")):
        return f"{encoder.name} is neither a CLIP nor a SigLIP, the image encoders that this export knows"
    if not isinstance(encoder.layer, int):
        return f"llama.cpp reads one layer of {encoder.name}, and these weights several"
    if encoder.drops_patch:
        return "llama.cpp keeps SigLIP's first patch, which these weights drop"
    if encoder.class_token:
        return "llama.cpp drops CLIP's class token, which these weights read"
    if config.kind != "llava" or config.end_of_image_token:
        return "llama.cpp knows projectors of the kind 'llava' without an end-of-image token only"
    if config.activation not in GELUS:
        return f"llama.cpp's projectors have GELU, and that of these weights has '{config.activation}'"
    if preset.prompt_template:
        return "these weights have a prompt template of their own"
    return ""


# The text model


def _write_text(language_model: nn.Module, tokenizer: Any, preset: Preset, path: Path, kind: str, merge: bool) -> None:
    writer = language_model_writer(language_model, path)
    add_tokenizer(writer, tokenizer, language_model.get_input_embeddings().num_embeddings)
    writer.add_chat_template(gguf_template(chat_format_of(preset), tokenizer))
    write_language_model(writer, language_model, kind, merge=merge)


def _quantize(quantizer: str, source: Path, target: Path) -> None:
    """Turns an f16 file into a Q4_K_M file with llama.cpp's program; the f16 file goes."""
    try:
        subprocess.run([quantizer, source, target, Q4_K_M.upper()], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        target.unlink(missing_ok=True)
        raise MmchatError(f"{QUANTIZER} could not quantize the text model. Choose --type q8_0, or f16.") from error
    finally:
        source.unlink()


# The adapter


def _write_adapter(model: VisionLanguageModel, path: Path) -> None:
    import gguf

    config = model.unwrapped_language_model.config
    (settings,) = model.language_model.peft_config.values()
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type].lower())
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(settings.lora_alpha))
    names = tensor_names(config)
    for name, tensor in model.unwrapped_language_model.state_dict().items():
        if ".lora_" not in name:
            continue
        layer, _, part = name.partition(".lora_")  # part: "A.default.weight"
        tensor = permuted(tensor, layer, config) if part.startswith("B") else tensor
        add_tensor(writer, f"{gguf_name(names, layer + '.weight')}.lora_{part[0].lower()}", tensor, "f32")
    finish(writer)


# The image encoder and the projector


def _is_clip(encoder: ImageEncoderPreset) -> bool:
    return bool(vision_of(encoder)[1].model_type.startswith("clip"))


def _write_mmproj(model: VisionLanguageModel, encoder: ImageEncoderPreset, path: Path, kind: str) -> None:
    import gguf
    from transformers import CLIPVisionModel, SiglipVisionModel

    network = image_network(encoder, CLIPVisionModel if _is_clip(encoder) else SiglipVisionModel)
    config, processor = network.config, load_image_processor(encoder)
    assert isinstance(encoder.layer, int)
    depth = encoder.layer % (config.num_hidden_layers + 1)  # the layers whose output the projector reads
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(config.image_size)
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_projection_dim(model.projector_config.hidden_size)
    writer.add_vision_block_count(depth)
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    writer.add_vision_image_mean(processor.image_mean)
    writer.add_vision_image_std(processor.image_std)
    writer.add_vision_use_gelu(config.hidden_act.startswith("gelu"))  # otherwise CLIP's quick GELU
    writer.add_array("clip.vision.feature_layer", [depth])
    kind = "f32" if kind == "f32" else "f16"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, config.num_hidden_layers)
    for name, tensor in network.state_dict().items():
        name = name if name.startswith("vision_model.") else f"vision_model.{name}"
        if any(part in name for part in ("post_layernorm", "position_ids", ".head.")) or _layer(name) >= depth:
            continue  # what comes after the chosen layer
        keep = "f32" if "embedding" in name else kind
        add_tensor(writer, gguf_name(names, f"vision_tower.{name}"), tensor, keep)
    for number, layer in ((0, model.projector.linear_1), (2, model.projector.linear_2)):
        add_tensor(writer, f"mm.{number}.weight", layer.weight, kind)
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
        add_tensor(writer, f"mm.{number}.bias", bias, kind)
    finish(writer)


def _layer(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else -1
