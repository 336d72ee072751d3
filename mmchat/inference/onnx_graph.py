"""A Llama model as an ONNX graph, which runs faster on a CPU than in PyTorch.

It gets 4-bit weights and an 8-bit output head, both lossless. The fast products with such weights round their inputs to
8 bits, one scale for 32 channels. A few channels hold values many times larger than the others, whatever the token, and
would spoil their block; they are multiplied in fp32, as in LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ..errors import AssetError
from ..models.onnx_export import FLOAT, INT32, GraphBuilder

logger = logging.getLogger(__name__)

T = TypeVar("T")

BLOCK = 32  # weights that share a scale
# The correction: what the 8-bit products lack. MatMulNBits assumes zero point 8; ours differs per block, so a multiple
# of each block's sum is missing, and so are the outlier channels. Both terms are low-rank, like LoRA, so all three
# enter the graph as one (down, up) pair, the "correction" inputs. This file beside the graph holds, for each part, its
# outlier channels and the rows of "up": one for each block, then one for each outlier. The "switch" inputs turn the
# adapter's ranks on or off for each row.
CORRECTION_FILE = "correction.safetensors"
CALIBRATION_TOKENS = 256  # random ones: outlier channels are the same whatever the text
PARTS = {  # one matrix product -> the linear layers fused in it
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def base_layers(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of a transformer layer, unwrapped from any adapter, with their part."""
    for part, names in PARTS.items():
        for name in names:
            linear = layer.get_submodule(name)
            yield part, getattr(linear, "base_layer", linear)


@torch.inference_mode()
def build_decoder(model: nn.Module, folder: Path) -> None:
    """Writes a Llama model without its adapter as an ONNX graph, with the weights in a file beside it."""
    import onnx
    from safetensors.torch import save_file

    logger.info("Packing the weights of %s once; this takes a few seconds", type(model).__name__)
    graph = _Decoder(model)
    save_file(graph.correction, folder / CORRECTION_FILE)
    onnx.save_model(
        graph.finish(),
        folder / "decoder.onnx",
        save_as_external_data=True,
        location="decoder.weights",
        size_threshold=1024,
    )


class _Decoder(GraphBuilder):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.config = model.config
        self.correction: dict[str, torch.Tensor] = {}
        self.outliers = outlier_channels(model)
        decoder = model.get_decoder()
        self._input("embeddings", FLOAT, ["rows", "tokens", self.config.hidden_size])
        self._input("last", INT32, ["rows"])
        self._input("length", INT32, [1])
        for part in PARTS:
            self._input(f"switch.{part}", FLOAT, ["rows", 1, f"rank.{part}"])
        self._rotary_tables(decoder)
        residual, normed = "embeddings", self._norm("embeddings", decoder.layers[0].input_layernorm, "first")
        next_norms = [layer.input_layernorm for layer in decoder.layers[1:]] + [decoder.norm]
        for index, (layer, next_norm) in enumerate(zip(decoder.layers, next_norms, strict=True)):
            attended = self._attention(normed, layer, index)
            residual, normed = self._add_and_norm(residual, attended, layer.post_attention_layernorm, f"{index}.middle")
            transformed = self._mlp(normed, layer, index)
            residual, normed = self._add_and_norm(residual, transformed, next_norm, f"{index}.end")
        last = self._node("Gather", [normed, self._weight("end", torch.tensor([-1]))], ["last.normed"], axis=1)
        logits = self._head(last, model.get_output_embeddings().weight)
        self._node("Identity", [logits], ["logits"])
        self.outputs.append(("logits", FLOAT, ["rows", self.config.vocab_size]))

    def _attention(self, normed: str, layer: nn.Module, index: int) -> str:
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        past, present = ([f"{when}.{index}.{kind}" for kind in ("key", "value")] for when in ("past", "present"))
        for name in past:
            self._input(name, FLOAT, ["rows", groups, "capacity", layer.self_attn.head_dim])
        self.outputs += [(name, FLOAT, ["rows", groups, "capacity", layer.self_attn.head_dim]) for name in present]
        attended = self._node(
            "GroupQueryAttention",
            [self._part(normed, layer, index, "qkv"), "", "", *past, "last", "length", "cosines", "sines"],
            [f"{index}.attention", *present],
            num_heads=heads,
            kv_num_heads=groups,
            do_rotary=1,
        )
        return self._part(attended, layer, index, "o")

    def _mlp(self, normed: str, layer: nn.Module, index: int) -> str:
        gate, up = f"{index}.gate", f"{index}.up"
        self._node("Split", [self._part(normed, layer, index, "gate_up")], [gate, up], axis=2, num_outputs=2)
        activated = self._node("QuickGelu", [gate], [f"{index}.silu"], alpha=1.0)  # x · sigmoid(x), which is SiLU
        product = self._node("Mul", [activated, up], [f"{index}.product"])
        return self._part(product, layer, index, "down")

    def _part(self, x: str, layer: nn.Module, index: int, part: str) -> str:
        """Fused linear layers: 4-bit matrix product, plus the correction and the adapter."""
        weight = torch.cat([linear.weight for kind, linear in base_layers(layer) if kind == part])
        name = f"{index}.{part}"
        codes, scale, lowest = _require_lossless(pack_4bit(weight), name)
        outliers = self.outliers[name]
        mask = torch.ones(weight.shape[1]).index_fill(0, outliers, 0)
        inliers = self._node("Mul", [x, self._weight(f"{name}.mask", mask)], [f"{name}.inliers"])
        product = self._packed(inliers, codes, scale, name, weight.shape, bits=4, accuracy_level=4)  # 8-bit inputs
        self.correction[f"{name}.outliers"] = outliers
        self.correction[name] = torch.cat([(lowest + 8 * scale).T, weight[:, outliers].T])  # [2 · blocks, outputs]
        down, up = f"correction.{name}.down", f"correction.{name}.up"
        self._input(down, FLOAT, [weight.shape[1], f"rank.{part}"])
        self._input(up, FLOAT, [f"rank.{part}", weight.shape[0]])
        narrow = self._node("MatMul", [x, down], [f"{name}.narrow"])
        narrow = self._node("Mul", [narrow, f"switch.{part}"], [f"{name}.switched"])
        correction = self._node("MatMul", [narrow, up], [f"{name}.correction"])
        return self._node("Add", [product, correction], [f"{name}.sum"])

    def _head(self, x: str, weight: torch.Tensor) -> str:
        """The output head with 8-bit weights, for one token of each row: [rows, 1, hidden_size] → [rows, vocabulary].

        With its inputs rounded to 8 bits, the error of the whole decoder would be half as large again. So x enters
        twice, as its value rounded to 8 bits and as the rounding error, rounded in turn; the two products are summed.
        """
        codes, scale = _require_lossless(pack_8bit(weight), "the output head")
        self._weight("head.as_blocks", torch.tensor([-1, BLOCK]))
        self._weight("head.as_pair", torch.tensor([2, -1, weight.shape[1]]))
        self._weight("head.axis", torch.tensor([1]))
        self._weight("head.127", torch.tensor([127.0]))
        self._weight("head.tiny", torch.tensor([1e-12]))
        for operation, inputs, output, attributes in (
            ("Reshape", [x, "head.as_blocks"], "blocks", {}),
            ("Abs", ["head.blocks"], "magnitudes", {}),
            ("ReduceMax", ["head.magnitudes", "head.axis"], "max", {"keepdims": 1}),
            ("Max", ["head.max", "head.tiny"], "positive_max", {}),
            ("Div", ["head.positive_max", "head.127"], "scale_of_x", {}),
            ("Div", ["head.blocks", "head.scale_of_x"], "scaled", {}),
            ("Round", ["head.scaled"], "codes_of_x", {}),
            ("Mul", ["head.codes_of_x", "head.scale_of_x"], "rounded", {}),
            ("Sub", ["head.blocks", "head.rounded"], "rounding_error", {}),
            ("Concat", ["head.rounded", "head.rounding_error"], "concatenated", {"axis": 0}),
            ("Reshape", ["head.concatenated", "head.as_pair"], "pair", {}),
        ):
            self._node(operation, inputs, [f"head.{output}"], **attributes)
        both = self._packed("head.pair", codes, scale, "head", weight.shape, bits=8, accuracy_level=4)
        return self._node("ReduceSum", [both, self._weight("head.pairs", torch.tensor([0]))], ["head.sum"], keepdims=0)

    def _packed(
        self, x: str, codes: torch.Tensor, scale: torch.Tensor, name: str, shape: torch.Size, **attributes: int
    ) -> str:
        return self._node(
            "MatMulNBits",
            [x, self._weight(f"{name}.codes", codes), self._weight(f"{name}.scale", scale)],
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

    def _add_and_norm(self, residual: str, x: str, norm: nn.Module, name: str) -> tuple[str, str]:
        """The residual stream plus x, and its RMSNorm."""
        outputs = [f"{name}.normed", "", "", f"{name}.residual"]
        weight = self._weight(f"{name}.norm", norm.weight)
        self._node("SkipSimplifiedLayerNormalization", [residual, x, weight], outputs, epsilon=norm.variance_epsilon)
        return outputs[3], outputs[0]

    def _rotary_tables(self, decoder: nn.Module) -> None:
        position = torch.arange(self.config.max_position_embeddings).float()
        angles = torch.outer(position, decoder.rotary_emb.inv_freq)  # [positions, head size / 2]
        self._weight("cosines", angles.cos())
        self._weight("sines", angles.sin())


def outlier_channels(model: nn.Module) -> dict[str, torch.Tensor]:
    """The input channels of each part that have the largest values, as many as there are blocks: part → [blocks]."""
    found: dict[str, torch.Tensor] = {}

    def watch(name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        largest = inputs[0].abs().amax(dim=(0, 1))  # [channels]
        found[name] = largest.topk(len(largest) // BLOCK).indices.sort().values

    hooks = [
        layer.get_submodule(names[0]).register_forward_pre_hook(partial(watch, f"{index}.{part}"))
        for index, layer in enumerate(model.get_decoder().layers)
        for part, names in PARTS.items()
    ]
    random = torch.Generator().manual_seed(0)
    length = min(CALIBRATION_TOKENS, model.config.max_position_embeddings)
    try:
        model(torch.randint(model.config.vocab_size, (1, length), generator=random), logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def pack_4bit(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Packs weights as lowest + code · scale per block, with codes 0 to 15. None if that is not lossless.

    Args:
        weight: [outputs, inputs].

    Returns:
        Codes, two per byte, [outputs, blocks, BLOCK / 2] uint8; scales and lowest values, [outputs, blocks].
    """
    if weight.shape[1] % BLOCK:
        return None
    blocks = weight.view(len(weight), -1, BLOCK)
    lowest, highest = blocks.aminmax(dim=2, keepdim=True)
    scale = ((highest - lowest) / 15).clamp(min=1e-12)
    codes = ((blocks - lowest) / scale).round()
    if not _is_lossless(lowest + codes * scale, blocks):
        return None
    packed = codes[:, :, 0::2] + 16 * codes[:, :, 1::2]
    return packed.to(torch.uint8), scale[:, :, 0], lowest[:, :, 0]


def pack_8bit(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Packs weights as (code - 128) · scale per block, with codes 1 to 255. None if that is not lossless.

    Returns:
        Codes, [outputs, blocks, BLOCK] uint8; scales, [outputs, blocks].
    """
    if weight.shape[1] % BLOCK:
        return None
    blocks = weight.view(len(weight), -1, BLOCK)
    scale = (blocks.abs().amax(dim=2, keepdim=True) / 127).clamp(min=1e-12)
    codes = (blocks / scale).round()
    return ((codes + 128).to(torch.uint8), scale[:, :, 0]) if _is_lossless(codes * scale, blocks) else None


def _is_lossless(unpacked: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether two tensors are equal up to fp32 rounding."""
    return torch.allclose(unpacked, exact, rtol=1e-5, atol=1e-6 * exact.abs().max().item())


def _require_lossless(packed: T | None, name: str) -> T:
    if packed is None:
        raise AssetError(f"The weights of {name} have too many levels for lossless packing.")
    return packed
