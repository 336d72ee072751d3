"""A Llama model on ONNX Runtime, multiplying with its weights as they came, in 4 bits: what reads and writes on a CPU.

To write one token every weight is read once, so the fewer bytes they take, the faster it goes; and PyTorch spends as
long on starting each of its many small operations as on computing. A model that came as a GGUF file of kind Q4_1 has 16
levels in each block of 32 weights, and 256 in its embeddings: they are kept like that, so nothing is rounded, and the
logits are those of PyTorch. The model's own weights, in 32 bits, stay on the disk.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .assets import convert_once
from .errors import AssetError

logger = logging.getLogger(__name__)

ROOM_STEP = 64  # tokens; a cache grows by no less
BLOCK = 32  # weights that share a scale
PARTS = {  # what is multiplied at once -> the layers in it
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


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
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401

        # "3" is the version of what build() writes: raise it when that changes
        folder = convert_once(f"decoder-3-{_digest(base)}", lambda target: build(base, target))
    except (ImportError, AssetError) as error:
        logger.warning("Answers are written by PyTorch, which is slower: %s", error)
        return None
    logger.info("Answers are written by ONNX Runtime, with the weights as they came, in 4 bits")
    return OnnxDecoder(folder / "decoder.onnx", model)


def _digest(model: nn.Module) -> str:
    """Tells base models apart by what is in them."""
    digest = hashlib.blake2b(digest_size=6)
    for _, linear in _base_layers(model.get_decoder().layers[-1]):
        digest.update(linear.weight.detach().numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def _is_fit(model: nn.Module) -> bool:
    """Whether it is a plain Llama whose weights have few levels, as far as a look at some of them tells."""
    config = model.config
    return (
        config.model_type == "llama"
        and model.dtype == torch.float32
        and next(model.parameters()).device.type == "cpu"
        and all(type(layer) is nn.Linear for _, layer in _base_layers(model.get_decoder().layers[0]))
        and config.hidden_act == "silu"
        and config.rope_parameters["rope_type"] == "default"
        and not (config.attention_bias or config.mlp_bias)
        and all(four_bits(layer.weight) is not None for _, layer in _base_layers(model.get_decoder().layers[-1]))
        and eight_bits(model.get_output_embeddings().weight[:256]) is not None
    )


def _base_layers(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of a transformer layer, those under an adapter too, by their part."""
    for part, names in PARTS.items():
        for name in names:
            linear = layer.get_submodule(name)
            yield part, getattr(linear, "base_layer", linear)


class OnnxDecoder:
    """Reads embeddings and says what may come next.

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
        self.model, self.path = model, path
        self._adapters: dict[bool, dict[str, Any]] = {}

    def empty_cache(self) -> OnnxCache:
        """For the keys and values of what will be read; the adapter is on in it if it is on now."""
        is_on = _adapter_is_on(self.model)
        if is_on not in self._adapters:
            self._adapters[is_on] = dict(_adapter_inputs(self.model, is_on))
        return OnnxCache(self._session, self._adapters[is_on])

    def read(self, embeddings: torch.Tensor, cache: OnnxCache) -> torch.Tensor:
        """What may come after them: [1, tokens, token_width] → logits, [1, vocabulary]. The cache grows."""
        return torch.from_numpy(cache.read(embeddings.numpy()))


class OnnxCache:
    """Keys and values, kept where ONNX Runtime adds to them in place."""

    def __init__(self, session: Any, adapter: dict[str, Any]):
        self._session, self._adapter = session, adapter
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
        copy = OnnxCache(self._session, self._adapter)
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
        for name, value in self._adapter.items():
            self._binding.bind_ortvalue_input(name, value)
        for value in self._session.get_inputs():
            if value.name.startswith("past."):
                _, heads, _, width = value.shape
                array = self._kept[value.name] = np.zeros((1, heads, room, width), dtype=np.float32)
                before = kept.get(value.name, array)
                fitting = min(room, before.shape[2])
                array[:, :, :fitting] = before[:, :, :fitting]
                # Read and written in the same place: only the new tokens' are added.
                place = OrtValue.ortvalue_from_numpy(array)
                self._binding.bind_ortvalue_input(value.name, place)
                self._binding.bind_ortvalue_output(value.name.replace("past.", "present."), place)
        self._binding.bind_output("logits")


def _roomy(length: int) -> int:
    """Room for some tokens and for a few more, so that it need not grow with each."""
    return length + max(ROOM_STEP, length // 4)


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

    logger.info("Packing the weights of %s once; this takes a few seconds", type(model).__name__)
    graph = _Graph(model)
    onnx.save_model(
        graph.finish(),
        folder / "decoder.onnx",
        save_as_external_data=True,
        location="decoder.weights",
        size_threshold=1024,
    )


def four_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Each block of weights as 16 levels: lowest + level · step. None if anything would be lost.

    Args:
        weight: [outputs, inputs].

    Returns:
        Levels, two in a byte, [outputs, blocks, BLOCK / 2] uint8; steps and lowest levels, [outputs, blocks].
    """
    if weight.shape[1] % BLOCK:
        return None
    blocks = weight.view(len(weight), -1, BLOCK)
    lowest, highest = blocks.aminmax(dim=2, keepdim=True)
    step = ((highest - lowest) / 15).clamp(min=1e-12)
    levels = ((blocks - lowest) / step).round()
    if not _is_same(lowest + levels * step, blocks):
        return None
    packed = levels[:, :, 0::2] + 16 * levels[:, :, 1::2]
    return packed.to(torch.uint8), step[:, :, 0], lowest[:, :, 0]


def eight_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Each block of weights as 255 levels, of which 128 is 0. None if anything would be lost.

    Returns:
        Levels, [outputs, blocks, BLOCK] uint8; steps, [outputs, blocks].
    """
    if weight.shape[1] % BLOCK:
        return None
    blocks = weight.view(len(weight), -1, BLOCK)
    step = (blocks.abs().amax(dim=2, keepdim=True) / 127).clamp(min=1e-12)
    levels = (blocks / step).round()
    return ((levels + 128).to(torch.uint8), step[:, :, 0]) if _is_same(levels * step, blocks) else None


def _is_same(near: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether two tensors differ by no more than rounding to 32 bits does."""
    return torch.allclose(near, exact, rtol=1e-5, atol=1e-6 * exact.abs().max().item())


def _not_lost(quantized: Any, name: str) -> Any:
    if quantized is None:
        raise AssetError(f"The weights of {name} have too many levels.")
    return quantized


class _Graph:
    """An ONNX graph, operation by operation; a value is named by the operation that makes it."""

    def __init__(self, model: nn.Module):
        self.config = model.config
        self.nodes, self.weights, self.inputs, self.outputs = [], [], [], []
        decoder = model.get_decoder()
        self._input("embeddings", 1, [1, "tokens", self.config.hidden_size])
        self._input("last", 6, [1])
        self._input("length", 6, [1])
        self._rotations(decoder)
        stream, normed = "embeddings", self._norm("embeddings", decoder.layers[0].input_layernorm, "first")
        after = [layer.input_layernorm for layer in decoder.layers[1:]] + [decoder.norm]
        for number, (layer, next_norm) in enumerate(zip(decoder.layers, after, strict=True)):
            attended = self._attention(normed, layer, number)
            stream, normed = self._add_and_norm(stream, attended, layer.post_attention_layernorm, f"{number}.middle")
            widened = self._mlp(normed, layer, number)
            stream, normed = self._add_and_norm(stream, widened, next_norm, f"{number}.end")
        last = self._node("Gather", [normed, self._weight("end", torch.tensor([-1]))], ["last.normed"], axis=1)
        logits = self._head(last, model.get_output_embeddings().weight)
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
        """x times weights of 4 bits."""
        levels, step, lowest = _not_lost(four_bits(weight), name)
        product = self._packed(x, levels, step, name, weight.shape, bits=4, accuracy_level=1)  # multiplies in 32 bits
        # ONNX Runtime takes level 8 for 0. What that leaves out is the same for a whole block: it multiplies the sum
        # of the block's inputs.
        inputs, blocks = weight.shape[1], weight.shape[1] // BLOCK
        sums = self._once(f"sums.{inputs}", lambda: torch.eye(blocks).repeat_interleave(BLOCK, dim=0))
        summed = self._node("MatMul", [x, sums], [f"{name}.block_sums"])
        rest = self._node("MatMul", [summed, self._weight(f"{name}.zero", (lowest + 8 * step).T)], [f"{name}.rest"])
        return self._node("Add", [product, rest], [f"{name}.whole"])

    def _head(self, x: str, weight: torch.Tensor) -> str:
        """x times weights of 8 bits: of one token, [1, 1, width] → [1, 1, vocabulary].

        ONNX Runtime is fast at that with inputs of 8 bits only. So x is made of two of these: itself, rounded, and what
        rounding took from it, rounded.
        """
        levels, step = _not_lost(eight_bits(weight), "the output head")
        self._weight("head.as_blocks", torch.tensor([-1, BLOCK]))
        self._weight("head.as_two", torch.tensor([1, 2, weight.shape[1]]))
        self._weight("head.axis", torch.tensor([1]))
        self._weight("head.127", torch.tensor([127.0]))
        self._weight("head.tiny", torch.tensor([1e-12]))
        for operation, inputs, output, attributes in (
            ("Reshape", [x, "head.as_blocks"], "blocks", {}),
            ("Abs", ["head.blocks"], "sizes", {}),
            ("ReduceMax", ["head.sizes", "head.axis"], "largest", {"keepdims": 1}),
            ("Max", ["head.largest", "head.tiny"], "above_0", {}),
            ("Div", ["head.above_0", "head.127"], "unit", {}),
            ("Div", ["head.blocks", "head.unit"], "in_units", {}),
            ("Round", ["head.in_units"], "rounded_units", {}),
            ("Mul", ["head.rounded_units", "head.unit"], "rounded", {}),
            ("Sub", ["head.blocks", "head.rounded"], "taken", {}),
            ("Concat", ["head.rounded", "head.taken"], "one_after_the_other", {"axis": 0}),
            ("Reshape", ["head.one_after_the_other", "head.as_two"], "two", {}),
        ):
            self._node(operation, inputs, [f"head.{output}"], **attributes)
        both = self._packed("head.two", levels, step, "head", weight.shape, bits=8, accuracy_level=4)
        return self._node("ReduceSum", [both, "head.axis"], ["head.sum"], keepdims=1)

    def _packed(
        self, x: str, levels: torch.Tensor, step: torch.Tensor, name: str, shape: torch.Size, **attributes: int
    ) -> str:
        return self._node(
            "MatMulNBits",
            [x, self._weight(f"{name}.levels", levels), self._weight(f"{name}.step", step)],
            [f"{name}.product"],
            N=shape[0],
            K=shape[1],
            block_size=BLOCK,
            **attributes,
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

    def _once(self, name: str, make: Callable[[], torch.Tensor]) -> str:
        """A weight that several operations share."""
        return name if any(weight.name == name for weight in self.weights) else self._weight(name, make())

    def _input(self, name: str, kind: int, shape: list) -> None:
        self.inputs.append((name, kind, shape))
