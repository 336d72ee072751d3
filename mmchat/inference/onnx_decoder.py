"""A Llama model on ONNX Runtime, multiplying with its weights as they came, in 4 bits: what reads and writes on a CPU.

To write one token every weight is read once, so the fewer bytes they take, the faster it goes; and PyTorch spends as
long on starting each of its many small operations as on computing. A model that came as a GGUF file of kind Q4_1 has 16
levels in each block of 32 weights, and 256 in its embeddings: they are kept like that, so nothing is rounded, and the
logits are those of PyTorch. The model's own weights, in 32 bits, stay on the disk.
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

SPARE_TOKENS = 64  # a cache grows by no less


def load_onnx_decoder(model: nn.Module) -> OnnxDecoder | None:
    """The decoder of a language model, built the first time; None where there can be none.

    It can be refused: with MMCHAT_DECODER=torch in the environment.

    Args:
        model: with or without a LoRA adapter.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if os.environ.get("MMCHAT_DECODER") == "torch" or not _is_fit(base):
        return None
    try:
        # "5" is the version of what build_decoder() writes: raise it when that changes
        folder = convert_once(f"decoder-5-{_digest(base)}", lambda target: build_decoder(base, target))
        decoder = OnnxDecoder(folder / "decoder.onnx", model)
    except Exception as error:  # onnxruntime's own come in many kinds; whatever it is, PyTorch can do the work
        logger.warning("Answers are written by PyTorch, which is slower: %s", error)
        return None
    logger.info("Answers are written by ONNX Runtime, with the weights as they came, in 4 bits")
    return decoder


def _digest(model: nn.Module) -> str:
    """Tells base models apart: by their settings, and by a few numbers of every weight, since all would take long."""
    digest = hashlib.blake2b(model.config.to_json_string().encode(), digest_size=6)
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            digest.update(weight.detach().flatten()[:64].numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def _is_fit(model: nn.Module) -> bool:
    """Whether it is a plain Llama whose weights have few levels, as far as a look at some of them tells."""
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
        path: what ``build_decoder`` wrote.
        model: the language model, whose adapter is used in caches with it.
    """

    def __init__(self, path: Path, model: nn.Module):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")  # between tokens PyTorch has the cores
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.model, self.path = model, path
        self._corrections: dict[bool, dict[str, Any]] = {}  # with the adapter, and without

    def new_cache(self, with_adapter: bool = True) -> OnnxCache:
        if with_adapter not in self._corrections:
            corrections = _correction_inputs(self.model, self.path.with_name(CORRECTION_FILE), with_adapter)
            self._corrections[with_adapter] = dict(corrections)
        return OnnxCache(self._session, self._corrections[with_adapter])

    def prefill(self, embeddings: torch.Tensor, cache: OnnxCache) -> torch.Tensor:
        return torch.from_numpy(cache.read(embeddings.numpy()))

    def step(self, token: torch.Tensor, cache: OnnxCache) -> torch.Tensor:
        return self.prefill(self.model.get_input_embeddings()(token), cache)


class OnnxCache:
    """Keys and values, kept where ONNX Runtime adds to them in place."""

    def __init__(self, session: Any, corrections: dict[str, Any]):
        self._session, self._corrections = session, corrections
        self._capacity = 0  # tokens
        self._kept: dict[str, np.ndarray] = {}  # [1, heads, capacity, head size] each
        self.length = 0  # tokens read

    @property
    def size(self) -> int:
        return sum(array.nbytes for array in self._kept.values())

    def crop(self, length: int) -> None:
        """Forgets what comes after the first tokens, and gives memory back, if it is much."""
        self.length = min(self.length, length)
        if self._capacity > 2 * _roomy(self.length):
            self._allocate(_roomy(self.length), self._kept)

    def prefix(self, length: int) -> OnnxCache:
        copy = OnnxCache(self._session, self._corrections)
        copy._allocate(length, self._kept)
        copy.length = length
        return copy

    def read(self, embeddings: np.ndarray) -> np.ndarray:
        """[1, tokens, hidden_size] → logits, [1, vocabulary]."""
        end = self.length + embeddings.shape[1]
        if end > self._capacity:
            self._allocate(_roomy(end), self._kept)
        self._binding.bind_cpu_input("embeddings", embeddings)
        self._binding.bind_cpu_input("last", np.array([end - 1], dtype=np.int32))
        self._binding.bind_cpu_input("length", np.array([end], dtype=np.int32))
        self._session.run_with_iobinding(self._binding)
        self.length = end
        return self._binding.get_outputs()[-1].numpy()[:, 0]

    def _allocate(self, capacity: int, kept: dict[str, np.ndarray]) -> None:
        """Takes arrays for so many tokens, and copies into them what is kept, as far as it fits."""
        from onnxruntime import OrtValue

        self._capacity, self._kept, self._binding = capacity, {}, self._session.io_binding()
        for name, value in self._corrections.items():
            self._binding.bind_ortvalue_input(name, value)
        for value in self._session.get_inputs():
            if value.name.startswith("past."):
                _, heads, _, width = value.shape
                array = self._kept[value.name] = _pages((1, heads, capacity, width))
                before = kept.get(value.name, array)
                fitting = min(capacity, before.shape[2])
                array[:, :, :fitting] = before[:, :, :fitting]
                # Read and written in the same place: only the new tokens' are added.
                place = OrtValue.ortvalue_from_numpy(array)
                self._binding.bind_ortvalue_input(value.name, place)
                self._binding.bind_ortvalue_output(value.name.replace("past.", "present."), place)
        self._binding.bind_output("logits")


def _pages(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros in memory of their own, which goes back to the system with them.

    Taken from the common heap, where threads allocate by turns, it would not: a crowd would make the app grow.
    """
    return np.frombuffer(mmap.mmap(-1, 4 * math.prod(shape)), dtype=np.float32).reshape(shape)


def _roomy(length: int) -> int:
    """A capacity for some tokens and for a few more, so that it need not grow with each."""
    return length + max(SPARE_TOKENS, length // 4)


def _correction_inputs(model: nn.Module, path: Path, with_adapter: bool) -> Iterator[tuple[str, Any]]:
    """What is added to the product of each part, [inputs, rank] and [rank, outputs]: see CORRECTION_FILE."""
    from onnxruntime import OrtValue
    from safetensors.torch import load_file

    blocks = load_file(path)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for number, layer in enumerate(base.get_decoder().layers):
        for part, names in PARTS.items():
            correction = blocks[f"{number}.{part}"]  # [blocks, outputs]
            down, up = [torch.eye(len(correction)).repeat_interleave(BLOCK, dim=0)], []
            for linear in map(layer.get_submodule, names):
                if with_adapter and hasattr(linear, "lora_A"):
                    down.append(linear.lora_A["default"].weight.T)  # [inputs, rank]
                    up.append(linear.lora_B["default"].weight.T * linear.scaling["default"])  # [rank, outputs]
                else:
                    up.append(torch.zeros(0, linear.weight.shape[0]))
            matrices = {"down": torch.cat(down, dim=1), "up": torch.cat([correction, torch.block_diag(*up)])}
            for kind, matrix in matrices.items():
                yield f"rest.{number}.{part}.{kind}", OrtValue.ortvalue_from_numpy(matrix.detach().numpy().copy())
