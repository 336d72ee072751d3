"""A causal language model as an OpenVINO graph with 8-bit weights and paged attention.

Llama, Mistral, Qwen2, Phi-2 and Phi-3 are variations on one architecture: ``quantized_weights`` reads all of them into
tensors with the same names, which are stored once, and ``build_language_model`` makes the graph from these.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..errors import BadInput
from .language_model import base_model, context_length

if TYPE_CHECKING:
    from openvino import Model, Node, Type

PAGE = 32  # tokens whose keys and values share a page; the only size that OpenVINO has on a CPU
MODEL_TYPES = ("llama", "mistral", "phi", "phi3", "qwen2")  # transformers' names
ROPE_TYPES = ("default", "linear", "llama3", "longrope")  # whose frequencies do not depend on the length
LAST = 2**31 - 1  # as the end of a slice: OpenVINO fuses rotary embeddings only where the largest int32 stands here
SMALL = 4  # numbers in a constant that layers share
GROUPS = (64, 32, 16)  # weights of a row with a common scale, the first that divides the row

# The last inputs of OpenVINO's paged attention, in its order, for features that are not used here.
UNUSED_INPUTS = {
    **dict.fromkeys(("score_aggregation_window", "rotated_block_indices", "rotation_deltas"), np.empty(0, np.int32)),
    **dict.fromkeys(("rotation_trig_lut", "xattention_threshold"), np.empty(0, np.float32)),
    **dict.fromkeys(("xattention_block_size", "xattention_stride"), np.int32(0)),
    "sinks": np.empty(0, np.float32),
    "adaptive_rkv_start_size": np.int32(0),
    "adaptive_rkv_evictable_sizes": np.empty(0, np.int32),
    "adaptive_rkv_diversity_block_set_indices": np.empty(0, np.int32),
    "adaptive_rkv_diversity_block_set_indices_begins": np.empty(0, np.int32),
    "token_type_ids": np.empty(0, np.int32),
    "qq_bias": np.empty(0, np.uint8),
    "qq_bias_begins": np.empty(0, np.int32),
}

# Our name of a part of a layer → transformers' names; those that a model has are joined in this order.
LAYER_PARTS = {
    "attention.norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"),
    "attention.output": ("self_attn.o_proj", "self_attn.dense"),
    "mlp.norm": ("post_attention_layernorm",),
    "mlp.up": ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj", "mlp.fc1"),
    "mlp.down": ("mlp.down_proj", "mlp.fc2"),
}
NORMS = ("norm", "final_layernorm")  # transformers' names of the last one


def import_openvino() -> ModuleType:
    """OpenVINO, without a package of its that reports every import to Google Analytics.

    Raises:
        ImportError: it is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as if it were missing
    import openvino

    return openvino


@torch.inference_mode()
def quantized_weights(model: nn.Module, *, merge: bool) -> dict[str, torch.Tensor]:
    """All weights but the token embeddings: linear layers as int8 ".weight", [outputs, inputs], and fp32 ".scale".

    Args:
        model: the language model; a LoRA adapter may be in it or around it.
        merge: adds the adapter to the weights. Otherwise these are the base model's.

    Raises:
        BadInput: the adapter has a part that cannot be added.
    """
    causal = base_model(model)
    decoder = causal.get_decoder()
    weights = {
        "rope.frequencies": decoder.rotary_emb.inv_freq.float(),  # [rotated / 2]
        "rope.scaling": torch.tensor(float(decoder.rotary_emb.attention_scaling)),
    }
    for index, layer in enumerate(decoder.layers):
        for part, names in LAYER_PARTS.items():
            weights |= _part(f"layers.{index}.{part}", layer, names, merge)
    return weights | _part("norm", decoder, NORMS, merge) | _part("head", causal, ("lm_head",), merge)


def _part(part: str, parent: nn.Module, names: tuple[str, ...], merge: bool) -> dict[str, torch.Tensor]:
    """The tensors of those modules of ``parent`` that exist, joined along the outputs."""
    modules = dict(parent.named_modules())
    found = [dict(_tensors(modules[name], merge)) for name in names if name in modules]
    joined = {kind: torch.cat([tensors[kind] for tensors in found]) for kind in (found[0] if found else {})}
    if "weight" in joined and joined["weight"].ndim == 2:
        joined["weight"], joined["scale"] = quantize(joined["weight"])
    return {f"{part}.{kind}": tensor for kind, tensor in joined.items()}


def _tensors(module: nn.Module, merge: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The weight of a norm or linear layer, with the adapter's share if wanted, and its bias if it has one."""
    layer = getattr(module, "base_layer", module)
    weight = layer.weight.float()
    if merge and layer is not module:
        if len(getattr(module, "lora_magnitude_vector", ())):
            raise BadInput("An adapter with DoRA has magnitudes, which OpenVINO's graph has no place for.")
        weight = weight + module.get_delta_weight("default").float()
    yield "weight", weight
    if getattr(layer, "bias", None) is not None:
        yield "bias", layer.bias.float()


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds a matrix to 8 bits, with a scale for each group of a row.

    Args:
        weight: [outputs, inputs].

    Returns:
        int8, [outputs, inputs], and fp32 scales, [outputs, groups].
    """
    outputs, inputs = weight.shape
    size = next((size for size in GROUPS if inputs % size == 0), inputs)
    grouped = weight.reshape(outputs, -1, size)  # [outputs, groups, size]
    scale = grouped.abs().amax(dim=2, keepdim=True) / 127
    rounded = (grouped / scale.masked_fill(scale == 0, 1)).round().to(torch.int8)
    return rounded.reshape(outputs, inputs), scale[..., 0].contiguous()


@dataclass(frozen=True)
class Shape:
    """What a graph needs to know of a language model's config."""

    hidden_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    norm_epsilon: float
    activation: str
    window: int  # latest tokens that a token attends to; 0: all

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The shape of a model with this transformers config, whose type is one of MODEL_TYPES."""
        has_window = getattr(config, "use_sliding_window", True)  # Qwen2 names a window that it does not use
        window = (has_window and getattr(config, "sliding_window", None)) or 0
        return cls(
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            config.layer_norm_eps if config.model_type == "phi" else config.rms_norm_eps,
            config.hidden_act,
            window if window < context_length(config) else 0,
        )


def build_language_model(weights: Mapping[str, np.ndarray], shape: Shape) -> Model:
    """The graph: tokens of several sequences, one after the other, → "logits", [outputs, vocabulary].

    Its inputs, all int32 but the first and the pages:

    - "embeddings", fp32, [tokens, hidden_size], and "positions", [tokens];
    - "outputs", [outputs]: the tokens whose logits are wanted;
    - "past_lens", [sequences], "subsequence_begins", [sequences + 1]: tokens before these, and where these begin;
    - "block_indices", "block_indices_begins", [sequences + 1]: the pages of all sequences, and where each one's begin;
    - "max_context_len", []: the length of the longest sequence;
    - "key_cache.0", "value_cache.0", …: the pages of each layer, [pages, …], in which keys and values are written.

    Args:
        weights: from ``quantized_weights``; the graph refers to them.
    """
    return _LanguageModel(weights, shape).model


class _LanguageModel:
    """Methods add nodes and return their output."""

    def __init__(self, weights: Mapping[str, np.ndarray], shape: Shape):
        openvino = import_openvino()
        from openvino import opset13

        self._openvino, self._ops = openvino, opset13
        self._weights, self._shape = weights, shape
        self._parameters: list[Node] = []
        self._small: dict[Any, Node] = {}  # constants that many layers share: the graph compiles a quarter sooner
        real, integer = openvino.Type.f32, openvino.Type.i32
        hidden = self._parameter("embeddings", [-1, shape.hidden_size], real)  # [tokens, hidden_size]
        self._cos, self._sin = self._rotations(self._parameter("positions", [-1], integer))
        outputs = self._parameter("outputs", [-1], integer)
        sequences = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")
        self._sequences = [self._parameter(name, [-1], integer) for name in sequences]
        self._longest = self._parameter("max_context_len", [], integer)
        for index in range(shape.layers):
            hidden = self._layer(hidden, f"layers.{index}")
        last = self._norm(opset13.gather(hidden, outputs, self._integers(0)), "norm")  # [outputs, hidden_size]
        logits = self._linear(last, "head")
        logits.output(0).get_tensor().set_names({"logits"})
        self.model = openvino.Model([opset13.result(logits)], self._parameters, "language model")

    def _layer(self, hidden: Node, name: str) -> Node:
        """A transformer layer, [tokens, hidden_size]; in Phi-2, attention and MLP read the same input."""
        normed = self._norm(hidden, f"{name}.attention.norm")
        attended = self._ops.add(hidden, self._attention(normed, f"{name}.attention"))
        if f"{name}.mlp.norm.weight" in self._weights:
            normed = self._norm(attended, f"{name}.mlp.norm")
        return self._ops.add(attended, self._mlp(normed, f"{name}.mlp"))

    def _attention(self, hidden: Node, name: str) -> Node:
        shape, size = self._shape, self._shape.head_size
        turned_heads = shape.heads + shape.key_value_heads
        joined = self._linear(hidden, f"{name}.qkv")  # [tokens, all heads · head_size]
        turned, values = self._split(joined, [turned_heads * size, shape.key_value_heads * size])
        turned = self._rotated(turned, turned_heads)
        arguments = [*self._split(turned, [shape.heads * size, shape.key_value_heads * size]), values]
        for kind in ("key", "value"):
            dynamic = self._openvino.Type.dynamic  # the compiler chooses type and layout
            arguments.append(self._parameter(f"{kind}_cache.{name.split('.')[1]}", [-1] * 4, dynamic).output(0))
        return self._linear(self._paged_attention(arguments), f"{name}.output")

    def _paged_attention(self, arguments: list[Any]) -> Any:
        """Attention of each token to its sequence (Kwon et al. 2023, arXiv 2309.06180), [tokens, heads · head_size].

        OpenVINO GenAI uses the same operation. In Python it has a private name, and its inputs differ between versions.

        Args:
            arguments: queries, keys and values, [tokens, heads · head_size] each; pages of keys, pages of values.
        """
        from openvino.op import _PagedAttentionExtension

        shape, none = self._shape, np.empty(0, np.float32)
        scale, window, slopes = map(self._constant, (np.float32(shape.head_size**-0.5), np.int32(shape.window), none))
        unused = map(self._constant, UNUSED_INPUTS.values())
        others = [*self._sequences, scale, window, slopes, self._longest, *unused]
        node = _PagedAttentionExtension([*arguments, *(node.output(0) for node in others)])
        information = node.get_rt_info()
        information["num_k_heads"] = information["num_v_heads"] = shape.key_value_heads
        information["k_head_size"] = information["v_head_size"] = shape.head_size
        return node.output(0)

    def _mlp(self, hidden: Node, name: str) -> Node:
        up = self._linear(hidden, f"{name}.up")
        if self._shape.activation == "silu":
            gate, up = self._split(up, [self._weights[f"{name}.down.weight"].shape[1]] * 2)
            return self._linear(self._ops.multiply(self._ops.swish(gate), up), f"{name}.down")
        return self._linear(self._ops.gelu(up, "tanh"), f"{name}.down")

    def _rotations(self, positions: Node) -> tuple[Node, Node]:
        """Cosines and sines of rotary embeddings, [tokens, 1, 1, rotated]."""
        column = self._reshape(self._ops.convert(positions, np.float32), [-1, 1, 1, 1])
        frequencies = self._constant(self._weights["rope.frequencies"][None, None, None])
        half = self._ops.multiply(column, frequencies)
        angles = self._ops.concat([half, half], 3)
        scaling = self._constant(self._weights["rope.scaling"])
        cos, sin = (self._ops.multiply(function(angles), scaling) for function in (self._ops.cos, self._ops.sin))
        return cos, sin

    def _rotated(self, values: Node, heads: int) -> Node:
        """Queries or keys with rotary embeddings (Su et al. 2021, arXiv 2104.09864), [tokens, heads · head_size]."""
        size = self._shape.head_size
        whole = self._reshape(values, [-1, heads, 1, size])
        half = len(self._weights["rope.frequencies"])
        turned = whole if 2 * half == size else self._slice(whole, 0, 2 * half)
        first, second = self._slice(turned, 0, half), self._slice(turned, half, LAST)
        swapped = self._ops.concat([self._ops.multiply(second, self._constant(np.float32(-1))), first], -1)
        turned = self._ops.add(self._ops.multiply(turned, self._cos), self._ops.multiply(swapped, self._sin))
        if 2 * half < size:
            turned = self._ops.concat([turned, self._slice(whole, 2 * half, LAST)], -1)
        return self._reshape(turned, [-1, heads * size])

    def _norm(self, values: Node, name: str) -> Node:
        """RMSNorm, or LayerNorm where there is a bias."""
        weight, epsilon = self._constant(self._weights[f"{name}.weight"]), self._shape.norm_epsilon
        if f"{name}.bias" in self._weights:
            normed = self._ops.mvn(values, self._integers([-1]), True, epsilon, "INSIDE_SQRT")
            bias = self._constant(self._weights[f"{name}.bias"])
            return self._ops.add(self._ops.multiply(normed, weight), bias)
        square = self._ops.power(values, self._constant(np.float32(2)))
        mean = self._ops.reduce_mean(square, self._integers([-1]), True)  # [tokens, 1]
        root = self._ops.sqrt(self._ops.add(mean, self._constant(np.float32(epsilon))))
        inverse = self._ops.divide(self._constant(np.float32(1)), root)
        return self._ops.multiply(self._ops.multiply(values, inverse), weight)

    def _linear(self, values: Node, name: str) -> Node:
        """[tokens, inputs] → [tokens, outputs]; when OpenVINO compiles this, the weights stay in 8 bits."""
        weight, scale = (self._weights[f"{name}.{kind}"] for kind in ("weight", "scale"))
        outputs, inputs = weight.shape
        grouped = self._constant(weight.reshape(outputs, scale.shape[1], -1))
        scaled = self._ops.multiply(self._ops.convert(grouped, np.float32), self._constant(scale[..., None]))
        product = self._ops.matmul(values, self._reshape(scaled, [outputs, inputs]), False, True)
        bias = self._weights.get(f"{name}.bias")
        return product if bias is None else self._ops.add(product, self._constant(bias))

    def _split(self, values: Node, sizes: list[int]) -> list[Any]:
        outputs: list[Any] = self._ops.variadic_split(values, self._integers(1), self._integers(sizes)).outputs()
        return outputs

    def _slice(self, values: Node, start: int, end: int) -> Node:
        return self._ops.slice(values, *(self._integers([number]) for number in (start, end, 1, 3)))

    def _reshape(self, values: Node, shape: list[int]) -> Node:
        return self._ops.reshape(values, self._integers(shape), False)

    def _integers(self, values: int | list[int]) -> Node:
        return self._constant(np.asarray(values, dtype=np.int64))

    def _constant(self, values: Any) -> Node:
        array = np.asarray(values)
        if array.size > SMALL:
            return self._ops.constant(array, shared_memory=True)
        key = array.dtype, array.shape, array.tobytes()
        if key not in self._small:
            self._small[key] = self._ops.constant(array)
        return self._small[key]

    def _parameter(self, name: str, shape: list[int], kind: Type) -> Node:
        node = self._ops.parameter(self._openvino.PartialShape(shape), kind)
        node.output(0).get_tensor().set_names({name})
        self._parameters.append(node)
        return node
