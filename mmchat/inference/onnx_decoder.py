"""A Llama decoder on ONNX Runtime with 4-bit weights and 8-bit inputs, for the CPU.

Decoding reads every weight once per token, so it is bound by memory bandwidth: smaller weights are faster. PyTorch also
spends as long on launching its many small operations as on computing. In a GGUF file of type Q4_1, a block of 32
weights has 16 levels (embeddings: 256). Packing keeps these levels, so the weights are lossless up to fp32 rounding.
Like llama.cpp, the decoder rounds the inputs of each matrix product to 8 bits, but keeps outlier channels in fp32, so
its logits are close but not equal to PyTorch's. The fp32 weights stay memory-mapped on disk.
"""

from __future__ import annotations

import hashlib
import logging
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..fetching.cache import convert_once
from .batch import Batch
from .onnx_graph import BLOCK, CORRECTION_FILE, PARTS, base_layers, build_decoder, pack_4bit, pack_8bit

if TYPE_CHECKING:
    from onnxruntime import IOBinding, OrtValue

logger = logging.getLogger(__name__)

MIN_SPARE_TOKENS = 16  # a prompt's cache grows by at least this
CAPACITY_STEP = 256  # tokens by which the rows of a batch grow at least


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
        # "11" is the version of build_decoder: raise it when its output changes
        with model.disable_adapter() if hasattr(model, "get_base_model") else nullcontext():
            folder = convert_once(f"decoder-11-{_digest(base)}", lambda target: build_decoder(base, target))
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
        self.model, self.path = model, path
        self._graph = _Graph(path, model)
        self.batch = Batch(OnnxRows(self._graph))

    def new_cache(self, with_adapter: bool = True) -> OnnxCache:
        return OnnxCache(self._graph, with_adapter)

    def prefill(self, embeddings: torch.Tensor, cache: OnnxCache) -> torch.Tensor:
        return torch.from_numpy(cache.append(embeddings.numpy()))


class _Graph:
    """The ONNX session, and its inputs other than embeddings, keys and values."""

    def __init__(self, path: Path, model: nn.Module):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")  # frees the cores between tokens
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        past = [value for value in self.session.get_inputs() if value.name.startswith("past.")]
        self.cache_shapes = {value.name: (value.shape[1], value.shape[3]) for value in past}  # heads and head size
        self._model, self._path = model, path
        self._corrections: dict[bool, dict[str, OrtValue]] = {}  # with the adapter -> graph inputs

    @torch.inference_mode()
    def embed(self, token_ids: list[int]) -> np.ndarray:
        """Embeds one token per row, [rows, 1, hidden_size]."""
        return self._model.get_input_embeddings()(torch.tensor(token_ids)[:, None]).numpy()

    def bind(self, binding: IOBinding, adapters: list[bool]) -> None:
        """Binds corrections and adapter for rows with the adapter on or off."""
        any_adapter = any(adapters)
        if any_adapter not in self._corrections:
            values = _correction_inputs(self._model, self._path.with_name(CORRECTION_FILE), any_adapter)
            self._corrections[any_adapter] = dict(values)
        for name, value in self._corrections[any_adapter].items():
            binding.bind_ortvalue_input(name, value)
        for part in PARTS:
            inputs, ranks = self._corrections[any_adapter][f"correction.0.{part}.down"].shape()
            switch = np.ones((len(adapters), 1, ranks), dtype=np.float32)
            switch[np.logical_not(adapters), :, 2 * (inputs // BLOCK) :] = 0
            binding.bind_cpu_input(f"switch.{part}", switch)

    def run(self, binding: IOBinding, embeddings: np.ndarray, lengths: list[int]) -> np.ndarray:
        """Appends embeddings, [rows, tokens, hidden_size], to caches of these lengths → logits, [rows, vocabulary]."""
        last = np.array(lengths, dtype=np.int32) + (embeddings.shape[1] - 1)
        binding.bind_cpu_input("embeddings", embeddings)
        binding.bind_cpu_input("last", last)
        binding.bind_cpu_input("length", last.max(keepdims=True) + 1)
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()


class _KeyValues:
    """Keys and values of every layer, [rows, heads, capacity, head size], which ONNX Runtime extends in place."""

    def __init__(self, graph: _Graph, rows: int, capacity: int):
        self._graph, self.rows, self.capacity = graph, rows, capacity
        self.arrays = {
            name: _mapped_zeros((rows, heads, capacity, head_size))
            for name, (heads, head_size) in (graph.cache_shapes.items() if rows * capacity else ())
        }

    @property
    def size(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def copy(self, row: int, source: _KeyValues, source_row: int, length: int) -> None:
        """Copies the first tokens of a row."""
        for name, array in source.arrays.items():
            self.arrays[name][row, :, :length] = array[source_row, :, :length]

    def binding(self, adapters: list[bool]) -> IOBinding:
        """A binding for the first rows, with the adapter on or off for each."""
        from onnxruntime import OrtValue

        binding = self._graph.session.io_binding()
        self._graph.bind(binding, adapters)
        for name, array in self.arrays.items():
            # Input and output share one buffer, so ONNX Runtime writes only the new tokens.
            buffer = OrtValue.ortvalue_from_numpy(array[: len(adapters)])
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past.", "present."), buffer)
        binding.bind_output("logits")
        return binding


class OnnxCache:
    """A ``Cache`` for one conversation."""

    def __init__(self, graph: _Graph, with_adapter: bool):
        self._graph, self.with_adapter = graph, with_adapter
        self.values = _KeyValues(graph, 1, 0)
        self.length = 0  # tokens

    @property
    def size(self) -> int:
        return self.values.size

    def prefix(self, length: int) -> OnnxCache:
        copy = OnnxCache(self._graph, self.with_adapter)
        copy.length = length
        copy._allocate(length, self.values)
        return copy

    def append(self, embeddings: np.ndarray) -> np.ndarray:
        """Runs the graph on embeddings, [1, tokens, hidden_size] → logits of the last token, [1, vocabulary]."""
        end = self.length + embeddings.shape[1]
        if end > self.values.capacity:
            self._allocate(_capacity_for(end), self.values)
        logits = self._graph.run(self._binding, embeddings, [self.length])
        self.length = end
        return logits

    def _allocate(self, capacity: int, source: _KeyValues) -> None:
        self.values = _KeyValues(self._graph, 1, capacity)
        self.values.copy(0, source, 0, self.length)
        self._binding = self.values.binding([self.with_adapter])


@dataclass(eq=False)
class _Row:
    with_adapter: bool
    length: int  # tokens


class OnnxRows:
    """``Rows`` in one buffer. Its first rows are in use; memory that was never written takes no space."""

    def __init__(self, graph: _Graph):
        self._graph = graph
        self._rows: list[_Row] = []
        self._values = _KeyValues(graph, 0, 0)
        self._bindings: dict[tuple[bool, ...], IOBinding] = {}  # adapters of the rows -> binding

    def add(self, cache: OnnxCache) -> _Row:
        self._reserve(len(self._rows) + 1, cache.length + 1)
        self._values.copy(len(self._rows), cache.values, 0, cache.length)
        self._rows.append(_Row(cache.with_adapter, cache.length))
        return self._rows[-1]

    def remove(self, row: _Row) -> None:
        """Removes a row; the last one takes its place."""
        index, last = self._rows.index(row), self._rows.pop()
        if last is not row:
            self._values.copy(index, self._values, len(self._rows), last.length)
            self._rows[index] = last
        if not self._rows:  # give the memory back
            self._values, self._bindings = _KeyValues(self._graph, 0, 0), {}

    def step(self, token_ids: dict[_Row, int]) -> list[tuple[_Row, torch.Tensor]]:
        """As in ``Rows``; a row without a token gets one that its next one overwrites."""
        self._reserve(len(self._rows), max(row.length for row in self._rows) + 1)
        adapters = tuple(row.with_adapter for row in self._rows)
        if adapters not in self._bindings:
            self._bindings = {adapters: self._values.binding(list(adapters))}
        embeddings = self._graph.embed([token_ids.get(row, 0) for row in self._rows])
        lengths = [row.length for row in self._rows]
        logits = torch.from_numpy(self._graph.run(self._bindings[adapters], embeddings, lengths))
        for row in token_ids:
            row.length += 1
        return [(row, logits[index]) for index, row in enumerate(self._rows) if row in token_ids]

    def _reserve(self, rows: int, length: int) -> None:
        """Makes room for this many rows of this length."""
        old = self._values
        if rows <= old.rows and length <= old.capacity:
            return
        rows = rows if rows <= old.rows else max(rows, 2 * old.rows)
        capacity = old.capacity if length <= old.capacity else length + max(CAPACITY_STEP, length // 4)
        self._values, self._bindings = _KeyValues(self._graph, rows, capacity), {}
        for index, row in enumerate(self._rows):
            self._values.copy(index, old, index, row.length)


def _mapped_zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros in a memory mapping of their own, which the system gets back when the array is freed.

    On the heap, allocations of many threads would fragment it, and the process would grow with every peak of load.
    """
    return np.frombuffer(mmap.mmap(-1, 4 * math.prod(shape)), dtype=np.float32).reshape(shape)


def _capacity_for(length: int) -> int:
    """A capacity with spare tokens, so the cache does not grow at every step."""
    return length + max(MIN_SPARE_TOKENS, length // 4)


@torch.inference_mode()
def _correction_inputs(model: nn.Module, path: Path, with_adapter: bool) -> Iterator[tuple[str, OrtValue]]:
    """Block sums, outlier channels and LoRA of each part as a (down, up) pair, [inputs, rank] and [rank, outputs]."""
    from onnxruntime import OrtValue
    from safetensors.torch import load_file

    correction = load_file(path)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = base.get_decoder().layers
    for part, names in PARTS.items():
        adapters = [_adapter(layer, names) if with_adapter else (torch.empty(0), torch.empty(0)) for layer in layers]
        rank = max(up.shape[0] for _, up in adapters)
        for index, (lora_down, lora_up) in enumerate(adapters):
            base_up, outliers = correction[f"{index}.{part}"], correction[f"{index}.{part}.outliers"]
            blocks, (base_rank, outputs) = len(outliers), base_up.shape  # base_rank is twice the number of blocks
            down, up = torch.zeros(blocks * BLOCK, base_rank + rank), torch.zeros(base_rank + rank, outputs)
            down[:, :blocks] = torch.eye(blocks).repeat_interleave(BLOCK, dim=0).index_fill(0, outliers, 0)
            down[outliers, torch.arange(blocks, base_rank)] = 1
            up[:base_rank] = base_up
            if len(lora_up):  # ranks that a layer lacks stay zero
                down[:, base_rank : base_rank + len(lora_up)] = lora_down
                up[base_rank : base_rank + len(lora_up)] = lora_up
            for kind, matrix in (("down", down), ("up", up)):
                yield f"correction.{index}.{part}.{kind}", OrtValue.ortvalue_from_numpy(matrix.numpy())


def _adapter(layer: nn.Module, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """LoRA weights of fused linear layers, [inputs, rank] and [rank, outputs]."""
    down, up = [], []
    for linear in map(layer.get_submodule, names):
        if hasattr(linear, "lora_A"):
            down.append(linear.lora_A["default"].weight.T)
            up.append(linear.lora_B["default"].weight.T * linear.scaling["default"])
        else:
            up.append(torch.zeros(0, linear.weight.shape[0]))
    return torch.cat(down, dim=1) if down else torch.empty(0), torch.block_diag(*up)
