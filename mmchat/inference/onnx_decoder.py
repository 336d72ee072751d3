"""A Llama decoder on ONNX Runtime with 4-bit weights, for the CPU.

Decoding reads every weight once per token, so it is bound by memory bandwidth: smaller weights are faster. PyTorch also
spends as long on launching its many small operations as on computing. In a GGUF file of type Q4_1, a block of 32
weights has 16 levels (embeddings: 256). Packing keeps these levels, so it is lossless and the logits equal PyTorch's.
The fp32 weights stay memory-mapped on disk.
"""

from __future__ import annotations

import hashlib
import logging
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..fetching.cache import convert_once
from .onnx_graph import BLOCK, CORRECTION_FILE, PARTS, base_layers, build_decoder, pack_4bit, pack_8bit

logger = logging.getLogger(__name__)

MIN_SPARE_TOKENS = 64  # a cache grows by at least this


def load_onnx_decoder(model: nn.Module) -> OnnxDecoder | None:
    """The ONNX decoder of a language model, built on first use; None if the model is not supported.

    MMCHAT_DECODER=torch in the environment disables it.

    Args:
        model: the language model, with or without a LoRA adapter.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if os.environ.get("MMCHAT_DECODER") == "torch" or not _is_supported(base):
        return None
    try:
        # "6" is the version of build_decoder: raise it when its output changes
        folder = convert_once(f"decoder-6-{_digest(base)}", lambda target: build_decoder(base, target))
        decoder = OnnxDecoder(folder / "decoder.onnx", model)
    except Exception as error:  # onnxruntime raises many types; PyTorch is the fallback for all of them
        logger.warning("ONNX Runtime cannot run this model; decoding with PyTorch, which is slower: %s", error)
        return None
    logger.info("Decoding with ONNX Runtime and 4-bit weights")
    return decoder


def _digest(model: nn.Module) -> str:
    """Digest of a base model: its config and the first values of every weight, since hashing all would be slow."""
    digest = hashlib.blake2b(model.config.to_json_string().encode(), digest_size=6)
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            digest.update(weight.detach().flatten()[:64].numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def _is_supported(model: nn.Module) -> bool:
    """Whether the model is a plain Llama whose weights pack losslessly; checks a sample of them."""
    config = model.config
    return (
        config.model_type == "llama"
        and model.dtype == torch.float32
        and next(model.parameters()).device.type == "cpu"
        and all(type(layer) is nn.Linear for _, layer in base_layers(model.get_decoder().layers[0]))
        and config.hidden_act == "silu"
        and config.rope_parameters["rope_type"] == "default"
        and not (config.attention_bias or config.mlp_bias)
        and all(pack_4bit(layer.weight) is not None for _, layer in base_layers(model.get_decoder().layers[-1]))
        and pack_8bit(model.get_output_embeddings().weight[:256]) is not None
    )


class OnnxDecoder:
    """A ``Decoder`` on ONNX Runtime.

    Args:
        path: the graph that ``build_decoder`` wrote.
        model: the language model; caches made with the adapter use its LoRA weights.
    """

    def __init__(self, path: Path, model: nn.Module):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")  # frees the cores between tokens
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.model, self.path = model, path
        self._corrections: dict[bool, dict[str, Any]] = {}  # with the adapter -> graph inputs

    def new_cache(self, with_adapter: bool = True) -> OnnxCache:
        if with_adapter not in self._corrections:
            corrections = _correction_inputs(self.model, self.path.with_name(CORRECTION_FILE), with_adapter)
            self._corrections[with_adapter] = dict(corrections)
        return OnnxCache(self._session, self._corrections[with_adapter])

    def prefill(self, embeddings: torch.Tensor, cache: OnnxCache) -> torch.Tensor:
        return torch.from_numpy(cache.append(embeddings.numpy()))

    def step(self, token: torch.Tensor, cache: OnnxCache) -> torch.Tensor:
        return self.prefill(self.model.get_input_embeddings()(token), cache)


class OnnxCache:
    """A ``Cache`` whose arrays ONNX Runtime extends in place."""

    def __init__(self, session: Any, corrections: dict[str, Any]):
        self._session, self._corrections = session, corrections
        self._capacity = 0  # tokens
        self._arrays: dict[str, np.ndarray] = {}  # [1, heads, capacity, head size] each
        self.length = 0  # tokens

    @property
    def size(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())

    def crop(self, length: int) -> None:
        """Keeps only the first ``length`` tokens, and frees memory if much of it is unused."""
        self.length = min(self.length, length)
        if self._capacity > 2 * _capacity_for(self.length):
            self._allocate(_capacity_for(self.length), self._arrays)

    def prefix(self, length: int) -> OnnxCache:
        copy = OnnxCache(self._session, self._corrections)
        copy._allocate(length, self._arrays)
        copy.length = length
        return copy

    def append(self, embeddings: np.ndarray) -> np.ndarray:
        """Runs the graph on embeddings, [1, tokens, hidden_size] → logits of the last token, [1, vocabulary]."""
        end = self.length + embeddings.shape[1]
        if end > self._capacity:
            self._allocate(_capacity_for(end), self._arrays)
        self._binding.bind_cpu_input("embeddings", embeddings)
        self._binding.bind_cpu_input("last", np.array([end - 1], dtype=np.int32))
        self._binding.bind_cpu_input("length", np.array([end], dtype=np.int32))
        self._session.run_with_iobinding(self._binding)
        self.length = end
        return self._binding.get_outputs()[-1].numpy()[:, 0]

    def _allocate(self, capacity: int, source: dict[str, np.ndarray]) -> None:
        """Allocates arrays for ``capacity`` tokens and copies as many from ``source`` as fit."""
        from onnxruntime import OrtValue

        self._capacity, self._arrays, self._binding = capacity, {}, self._session.io_binding()
        for name, value in self._corrections.items():
            self._binding.bind_ortvalue_input(name, value)
        for value in self._session.get_inputs():
            if value.name.startswith("past."):
                _, heads, _, head_size = value.shape
                array = self._arrays[value.name] = _mapped_zeros((1, heads, capacity, head_size))
                old = source.get(value.name, array)
                fitting = min(capacity, old.shape[2])
                array[:, :, :fitting] = old[:, :, :fitting]
                # Input and output share one buffer, so ONNX Runtime writes only the new tokens.
                buffer = OrtValue.ortvalue_from_numpy(array)
                self._binding.bind_ortvalue_input(value.name, buffer)
                self._binding.bind_ortvalue_output(value.name.replace("past.", "present."), buffer)
        self._binding.bind_output("logits")


def _mapped_zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros in a memory mapping of their own, which the system gets back when the array is freed.

    On the heap, allocations of many threads would fragment it, and the process would grow with every crowd.
    """
    return np.frombuffer(mmap.mmap(-1, 4 * math.prod(shape)), dtype=np.float32).reshape(shape)


def _capacity_for(length: int) -> int:
    """A capacity with spare tokens, so the cache does not grow at every step."""
    return length + max(MIN_SPARE_TOKENS, length // 4)


def _correction_inputs(model: nn.Module, path: Path, with_adapter: bool) -> Iterator[tuple[str, Any]]:
    """Zero-point correction and LoRA weights of each part as a (down, up) pair, [inputs, rank] and [rank, outputs]."""
    from onnxruntime import OrtValue
    from safetensors.torch import load_file

    blocks = load_file(path)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for index, layer in enumerate(base.get_decoder().layers):
        for part, names in PARTS.items():
            correction = blocks[f"{index}.{part}"]  # [blocks, outputs]
            down, up = [torch.eye(len(correction)).repeat_interleave(BLOCK, dim=0)], []
            for linear in map(layer.get_submodule, names):
                if with_adapter and hasattr(linear, "lora_A"):
                    down.append(linear.lora_A["default"].weight.T)  # [inputs, rank]
                    up.append(linear.lora_B["default"].weight.T * linear.scaling["default"])  # [rank, outputs]
                else:
                    up.append(torch.zeros(0, linear.weight.shape[0]))
            matrices = {"down": torch.cat(down, dim=1), "up": torch.cat([correction, torch.block_diag(*up)])}
            for kind, matrix in matrices.items():
                yield f"correction.{index}.{part}.{kind}", OrtValue.ortvalue_from_numpy(matrix.detach().numpy().copy())
