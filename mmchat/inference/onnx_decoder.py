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
from .onnx_graph import BLOCK, PARTS, REST, base_layers, build_decoder, eight_bits, four_bits

logger = logging.getLogger(__name__)

ROOM_STEP = 64  # tokens; a cache grows by no less


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
        and all(four_bits(layer.weight) is not None for _, layer in base_layers(model.get_decoder().layers[-1]))
        and eight_bits(model.get_output_embeddings().weight[:256]) is not None
    )


class OnnxDecoder:
    """Reads embeddings and says what may come next.

    Args:
        path: what ``build_decoder`` wrote.
        model: the language model whose adapter is used while it is on.
    """

    def __init__(self, path: Path, model: nn.Module):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")  # between tokens PyTorch has the cores
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.model, self.path = model, path
        self._rests: dict[bool, dict[str, Any]] = {}  # with the adapter, and without

    def empty_cache(self) -> OnnxCache:
        """For the keys and values of what will be read; the adapter is on in it if it is on now."""
        is_on = _adapter_is_on(self.model)
        if is_on not in self._rests:
            self._rests[is_on] = dict(_rest_inputs(self.model, self.path.with_name(REST), is_on))
        return OnnxCache(self._session, self._rests[is_on])

    def read(self, embeddings: torch.Tensor, cache: OnnxCache) -> torch.Tensor:
        """What may come after them: [1, tokens, token_width] → logits, [1, vocabulary]. The cache grows."""
        return torch.from_numpy(cache.read(embeddings.numpy()))


class OnnxCache:
    """Keys and values, kept where ONNX Runtime adds to them in place."""

    def __init__(self, session: Any, rest: dict[str, Any]):
        self._session, self._rest = session, rest
        self._room = 0  # tokens
        self._kept: dict[str, np.ndarray] = {}  # [1, heads, room, head width] each
        self.length = 0  # tokens read

    @property
    def size(self) -> int:
        """Bytes of the keys and values."""
        return sum(array.nbytes for array in self._kept.values())

    def crop(self, length: int) -> None:
        """Forgets what comes after the first tokens, and gives much of their room back, if it is much."""
        self.length = min(self.length, length)
        if self._room > 2 * _roomy(self.length):
            self._make_room(_roomy(self.length), self._kept)

    def beginning(self, length: int) -> OnnxCache:
        """A copy of the first tokens' keys and values."""
        copy = OnnxCache(self._session, self._rest)
        copy._make_room(length, self._kept)
        copy.length = length
        return copy

    def read(self, embeddings: np.ndarray) -> np.ndarray:
        """[1, tokens, token_width] → logits, [1, vocabulary]."""
        end = self.length + embeddings.shape[1]
        if end > self._room:
            self._make_room(_roomy(end), self._kept)
        self._binding.bind_cpu_input("embeddings", embeddings)
        self._binding.bind_cpu_input("last", np.array([end - 1], dtype=np.int32))
        self._binding.bind_cpu_input("length", np.array([end], dtype=np.int32))
        self._session.run_with_iobinding(self._binding)
        self.length = end
        return self._binding.get_outputs()[-1].numpy()[:, 0]

    def _make_room(self, room: int, kept: dict[str, np.ndarray]) -> None:
        """Takes arrays of so many tokens, and copies into them what is kept, as far as it fits."""
        from onnxruntime import OrtValue

        self._room, self._kept, self._binding = room, {}, self._session.io_binding()
        for name, value in self._rest.items():
            self._binding.bind_ortvalue_input(name, value)
        for value in self._session.get_inputs():
            if value.name.startswith("past."):
                _, heads, _, width = value.shape
                array = self._kept[value.name] = _pages((1, heads, room, width))
                before = kept.get(value.name, array)
                fitting = min(room, before.shape[2])
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
    """Room for some tokens and for a few more, so that it need not grow with each."""
    return length + max(ROOM_STEP, length // 4)


def _adapter_is_on(model: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) and not module.disable_adapters for module in model.modules())


def _rest_inputs(model: nn.Module, path: Path, is_on: bool) -> Iterator[tuple[str, Any]]:
    """What is added to the product of each part, [inputs, rank] and [rank, outputs]: see REST."""
    from onnxruntime import OrtValue
    from safetensors.torch import load_file

    blocks = load_file(path)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for number, layer in enumerate(base.get_decoder().layers):
        for part, names in PARTS.items():
            left_out = blocks[f"{number}.{part}"]  # [blocks, outputs]
            down, up = [torch.eye(len(left_out)).repeat_interleave(BLOCK, dim=0)], []
            for linear in map(layer.get_submodule, names):
                if is_on and hasattr(linear, "lora_A"):
                    down.append(linear.lora_A["default"].weight.T)  # [inputs, rank]
                    up.append(linear.lora_B["default"].weight.T * linear.scaling["default"])  # [rank, outputs]
                else:
                    up.append(torch.zeros(0, linear.weight.shape[0]))
            matrices = {"down": torch.cat(down, dim=1), "up": torch.cat([left_out, torch.block_diag(*up)])}
            for kind, matrix in matrices.items():
                yield f"rest.{number}.{part}.{kind}", OrtValue.ortvalue_from_numpy(matrix.detach().numpy().copy())
