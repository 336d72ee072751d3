"""A Llama model on ONNX Runtime with weights of 8 bits, one token at a time: what writes answers on a CPU.

To write one token every weight is read once, so the fewer bytes they take, the faster it goes; and PyTorch spends as
long on starting each of its many small operations as on computing. Here weights have 8 bits, in blocks of 32 that share
a scale, and a layer is a few large operations. Questions and pictures are still read by PyTorch, in full precision, and
so is an answer when it has become part of a conversation: what is read never depends on who wrote it.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .assets import convert_once
from .errors import AssetError

logger = logging.getLogger(__name__)

BLOCK = 32  # weights that share a scale
BITS = 8
LEVELS = 127  # on either side of 0
PARTS = {  # what is multiplied at once -> the layers in it
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def load_decoder(model: nn.Module) -> Decoder | None:
    """The decoder of a language model, built the first time; None where there can be none.

    It can be refused: with MMCHAT_DECODER=torch in the environment.

    Args:
        model: with or without a LoRA adapter.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if os.environ.get("MMCHAT_DECODER") == "torch" or not _is_plain_llama(base):
        return None
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401

        # "1" is the version of what build() writes: raise it when that changes
        folder = convert_once(f"decoder-1-{_digest(base)}", lambda target: build(base, target))
    except (ImportError, AssetError) as error:
        logger.warning("Answers are written by PyTorch, which is slower: %s", error)
        return None
    logger.info("Answers are written by ONNX Runtime, with weights of 8 bits")
    return Decoder(folder / "decoder.onnx", model)


def _digest(model: nn.Module) -> str:
    """Tells base models apart by what is in them."""
    digest = hashlib.blake2b(digest_size=6)
    for _, linear in _base_layers(model.get_decoder().layers[-1]):
        digest.update(linear.weight.detach().numpy().tobytes())
    return digest.hexdigest()


def _is_plain_llama(model: nn.Module) -> bool:
    config = model.config
    return (
        config.model_type == "llama"
        and model.dtype == torch.float32
        and next(model.parameters()).device.type == "cpu"
        and all(type(layer) is nn.Linear for _, layer in _base_layers(model.get_decoder().layers[0]))
        and config.hidden_act == "silu"
        and config.rope_parameters["rope_type"] == "default"
        and not (config.attention_bias or config.mlp_bias)
    )


def _base_layers(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of a transformer layer, those under an adapter too, by their part."""
    for part, names in PARTS.items():
        for name in names:
            linear = layer.get_submodule(name)
            yield part, getattr(linear, "base_layer", linear)


class Decoder:
    """Writes on from the keys and values of what was read.

    Args:
        path: what ``build`` wrote.
        model: the language model whose adapter is used while it is on.
    """

    def __init__(self, path: Path, model: nn.Module):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")  # between tokens PyTorch has the cores
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._embedding = model.get_input_embeddings().weight.detach().numpy()  # [vocabulary, width]
        self._model, self.path = model, path
        self._adapters: dict[bool, dict[str, Any]] = {}

    def start(self, cache: Any, room: int) -> Writing:
        """An answer to what has been read; the adapter is on in it if it is on now.

        Args:
            cache: a DynamicCache, which stays as it is.
            room: how many tokens will be written at most.
        """
        is_on = _adapter_is_on(self._model)
        if is_on not in self._adapters:
            self._adapters[is_on] = dict(_adapter_inputs(self._model, is_on))
        return Writing(self._session, self._embedding, self._adapters[is_on], cache, room)


class Writing:
    """One answer on its way."""

    def __init__(self, session: Any, embedding: np.ndarray, adapter: dict[str, Any], cache: Any, room: int):
        from onnxruntime import OrtValue

        self._session, self._embedding = session, embedding
        self._length = cache.get_seq_length()  # tokens read and written
        self._binding = session.io_binding()
        for name, value in adapter.items():
            self._binding.bind_ortvalue_input(name, value)
        self._kept = []  # keys and values of each layer
        for number, layer in enumerate(cache.layers):
            for kind, tensor in (("key", layer.keys), ("value", layer.values)):
                whole = np.zeros((*tensor.shape[:2], self._length + room, tensor.shape[3]), dtype=np.float32)
                whole[:, :, : self._length] = tensor.numpy()  # [1, heads, tokens, head width]
                value = OrtValue.ortvalue_from_numpy(whole)
                self._kept.append(value)
                # Read and written in the same place: only the new token's are added.
                self._binding.bind_ortvalue_input(f"past.{number}.{kind}", value)
                self._binding.bind_ortvalue_output(f"present.{number}.{kind}", value)
        self._binding.bind_output("logits")

    def read(self, token_id: int) -> torch.Tensor:
        """What may come after one more token: logits, [1, vocabulary]."""
        self._binding.bind_cpu_input("embedding", self._embedding[token_id].reshape(1, 1, -1))
        self._binding.bind_cpu_input("last", np.array([self._length], dtype=np.int32))
        self._binding.bind_cpu_input("length", np.array([self._length + 1], dtype=np.int32))
        self._session.run_with_iobinding(self._binding)
        self._length += 1
        return torch.from_numpy(self._binding.get_outputs()[-1].numpy())[:, 0]


def _adapter_is_on(model: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) and not module.disable_adapters for module in model.modules())


def _adapter_inputs(model: nn.Module, is_on: bool) -> Iterator[tuple[str, Any]]:
    """The two small matrices of each part: [inputs, rank] and [rank, outputs]; of rank 0 where the adapter is off."""
    from onnxruntime import OrtValue

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for number, layer in enumerate(base.get_decoder().layers):
        for part, names in PARTS.items():
            linears = [layer.get_submodule(name) for name in names]
            down, up = [], []
            for linear in linears:
                outputs, inputs = linear.weight.shape
                if is_on and hasattr(linear, "lora_A"):
                    down.append(linear.lora_A["default"].weight.T)  # [inputs, rank]
                    up.append(linear.lora_B["default"].weight.T * linear.scaling["default"])  # [rank, outputs]
                else:
                    down.append(torch.zeros(inputs, 0))
                    up.append(torch.zeros(0, outputs))
            for kind, matrix in (("down", torch.cat(down, dim=1)), ("up", torch.block_diag(*up))):
                yield f"adapter.{number}.{part}.{kind}", OrtValue.ortvalue_from_numpy(matrix.detach().numpy().copy())


@torch.inference_mode()
def build(model: nn.Module, folder: Path) -> None:
    """Writes the base model as an ONNX graph with its weights beside it."""
    import onnx

    logger.info("Rounding %s to 8 bits once; this takes a few seconds", type(model).__name__)
    graph = _Graph(model)
    onnx.save_model(
        graph.finish(),
        folder / "decoder.onnx",
        save_as_external_data=True,
        location="decoder.weights",
        size_threshold=1024,
    )


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[outputs, inputs] → numbers of levels, [outputs, blocks, BLOCK] uint8, and scales, [outputs, blocks].

    The middle level, 128, is 0; inputs are filled up with zeros to whole blocks.
    """
    outputs, inputs = weight.shape
    blocks = nn.functional.pad(weight, (0, -inputs % BLOCK)).view(outputs, -1, BLOCK)
    scale = blocks.abs().amax(dim=2).clamp(min=1e-12) / LEVELS
    levels = (blocks / scale[:, :, None]).round() + LEVELS + 1
    return levels.to(torch.uint8), scale


class _Graph:
    """An ONNX graph, operation by operation; a value is named by the operation that makes it."""

    def __init__(self, model: nn.Module):
        self.config = model.config
        self.nodes, self.weights, self.inputs, self.outputs = [], [], [], []
        decoder = model.get_decoder()
        self._input("embedding", 1, [1, 1, self.config.hidden_size])
        self._input("last", 6, [1])
        self._input("length", 6, [1])
        self._rotations(decoder)
        stream, normed = "embedding", self._norm("embedding", decoder.layers[0].input_layernorm, "first")
        after = [layer.input_layernorm for layer in decoder.layers[1:]] + [decoder.norm]
        for number, (layer, next_norm) in enumerate(zip(decoder.layers, after, strict=True)):
            attended = self._attention(normed, layer, number)
            stream, normed = self._add_and_norm(stream, attended, layer.post_attention_layernorm, f"{number}.middle")
            widened = self._mlp(normed, layer, number)
            stream, normed = self._add_and_norm(stream, widened, next_norm, f"{number}.end")
        logits = self._product(normed, model.get_output_embeddings().weight, "head")
        self._node("Identity", [logits], ["logits"])
        self.outputs.append(("logits", 1, [1, 1, self.config.vocab_size]))

    def finish(self) -> Any:
        """The model, checked."""
        from onnx import helper

        def described(values):
            return [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in values]

        graph = helper.make_graph(self.nodes, "decoder", described(self.inputs), described(self.outputs), self.weights)
        versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=versions, ir_version=10)

    def _attention(self, normed: str, layer: nn.Module, number: int) -> str:
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        past, present = ([f"{when}.{number}.{kind}" for kind in ("key", "value")] for when in ("past", "present"))
        for name in past:
            self._input(name, 1, [1, groups, "room", layer.self_attn.head_dim])
        self.outputs += [(name, 1, [1, groups, "room", layer.self_attn.head_dim]) for name in present]
        attended = self._node(
            "GroupQueryAttention",
            [self._part(normed, layer, number, "qkv"), "", "", *past, "last", "length", "cosines", "sines"],
            [f"{number}.attention", *present],
            num_heads=heads,
            kv_num_heads=groups,
            do_rotary=1,
        )
        return self._part(attended, layer, number, "o")

    def _mlp(self, normed: str, layer: nn.Module, number: int) -> str:
        gate, up = f"{number}.gate", f"{number}.up"
        self._node("Split", [self._part(normed, layer, number, "gate_up")], [gate, up], axis=2, num_outputs=2)
        opened = self._node("QuickGelu", [gate], [f"{number}.open"], alpha=1.0)  # x sigmoid(x), that is SiLU
        product = self._node("Mul", [opened, up], [f"{number}.product"])
        return self._part(product, layer, number, "down")

    def _part(self, x: str, layer: nn.Module, number: int, part: str) -> str:
        """Linear layers at once, and what the adapter adds to them."""
        weight = torch.cat([linear.weight for kind, linear in _base_layers(layer) if kind == part])
        name = f"{number}.{part}"
        down, up = f"adapter.{name}.down", f"adapter.{name}.up"
        rank = f"rank.{part}"
        self._input(down, 1, [weight.shape[1], rank])
        self._input(up, 1, [rank, weight.shape[0]])
        narrow = self._node("MatMul", [x, down], [f"{name}.narrow"])
        change = self._node("MatMul", [narrow, up], [f"{name}.change"])
        return self._node("Add", [self._product(x, weight, name), change], [f"{name}.sum"])

    def _product(self, x: str, weight: torch.Tensor, name: str) -> str:
        levels, scale = quantize_blocks(weight)
        return self._node(
            "MatMulNBits",
            [x, self._weight(f"{name}.levels", levels), self._weight(f"{name}.scale", scale)],
            [f"{name}.out"],
            K=weight.shape[1],
            N=weight.shape[0],
            bits=BITS,
            block_size=BLOCK,
            accuracy_level=4,  # multiplies in 8 bits, too
        )

    def _norm(self, x: str, norm: nn.Module, name: str) -> str:
        weight = self._weight(f"{name}.norm", norm.weight)
        node = {"epsilon": norm.variance_epsilon, "axis": -1, "stash_type": 1}
        return self._node("SimplifiedLayerNormalization", [x, weight], [f"{name}.normed"], **node)

    def _add_and_norm(self, stream: str, x: str, norm: nn.Module, name: str) -> tuple[str, str]:
        outputs = [f"{name}.normed", "", "", f"{name}.stream"]
        weight = self._weight(f"{name}.norm", norm.weight)
        self._node("SkipSimplifiedLayerNormalization", [stream, x, weight], outputs, epsilon=norm.variance_epsilon)
        return outputs[3], outputs[0]

    def _rotations(self, decoder: nn.Module) -> None:
        position = torch.arange(self.config.max_position_embeddings).float()
        angles = torch.outer(position, decoder.rotary_emb.inv_freq)  # [positions, head width / 2]
        self._weight("cosines", angles.cos())
        self._weight("sines", angles.sin())

    def _node(self, operation: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        from onnx import helper

        own = ("GroupQueryAttention", "MatMulNBits", "SkipSimplifiedLayerNormalization", "QuickGelu")
        domain = "com.microsoft" if operation in own else ""
        self.nodes.append(helper.make_node(operation, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def _weight(self, name: str, tensor: torch.Tensor) -> str:
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(tensor.detach().contiguous().numpy(), name))
        return name

    def _input(self, name: str, kind: int, shape: list) -> None:
        self.inputs.append((name, kind, shape))
