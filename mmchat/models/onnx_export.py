"""The EfficientNet-Lite as an ONNX graph, built node by node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .efficientnet import Block, ConvNorm, EfficientNet

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

FLOAT = 1  # onnx.TensorProto's number


@torch.inference_mode()
def build_image_encoder(network: EfficientNet) -> bytes:
    """Exports an EfficientNet-Lite with folded batch norms: "pixels", [batch, 3, height, width] → "maps"."""
    return _EfficientNet(network).finish().SerializeToString()


class _EfficientNet:
    """Each method adds nodes and returns the name of its output."""

    def __init__(self, network: EfficientNet):
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []
        self.inputs: list[tuple[str, int, list[int | str]]] = []
        self.outputs: list[tuple[str, int, list[int | str]]] = []
        self.limits = [self._weight("lowest", torch.tensor(0.0)), self._weight("highest", torch.tensor(6.0))]  # ReLU6
        maps = self._input("pixels", FLOAT, ["batch", 3, "rows", "columns"])
        maps = self._convolution(maps, network.stem, "stem")
        for index, block in enumerate(network.blocks):
            maps = self._block(maps, block, f"block.{index}")
        self._node("Identity", [self._convolution(maps, network.head, "head")], ["maps"])
        self.outputs.append(("maps", FLOAT, ["batch", network.head.convolution.out_channels, "height", "width"]))

    def _block(self, maps: str, block: Block, name: str) -> str:
        wide = self._convolution(maps, block.expand, f"{name}.expand") if hasattr(block, "expand") else maps
        mixed = self._convolution(wide, block.depthwise, f"{name}.depthwise")
        narrow = self._convolution(mixed, block.project, f"{name}.project")
        return self._node("Add", [narrow, maps], [f"{name}.sum"]) if block.is_residual else narrow

    def _convolution(self, maps: str, layer: ConvNorm, name: str) -> str:
        convolution = layer.convolution
        weights = [self._weight(f"{name}.weight", convolution.weight), self._weight(f"{name}.bias", convolution.bias)]
        padding = [convolution.before, convolution.before, convolution.after, convolution.after]
        shape = {"strides": list(convolution.stride), "pads": padding, "group": convolution.groups}
        maps = self._node("Conv", [maps, *weights], [f"{name}.convolved"], **shape)
        return self._node("Clip", [maps, *self.limits], [name]) if layer.has_activation else maps

    def finish(self) -> ModelProto:
        """The graph as an ONNX model."""
        from onnx import helper

        def infos(values: list[tuple[str, int, list[int | str]]]) -> list[ValueInfoProto]:
            return [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in values]

        graph = helper.make_graph(self.nodes, "network", infos(self.inputs), infos(self.outputs), self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    def _node(self, operation: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(operation, inputs, outputs, **attributes))
        return outputs[0]

    def _weight(self, name: str, tensor: torch.Tensor) -> str:
        from onnx import numpy_helper

        self.weights.append(numpy_helper.from_array(tensor.detach().contiguous().numpy(), name))
        return name

    def _input(self, name: str, kind: int, shape: list[int | str]) -> str:
        self.inputs.append((name, kind, shape))
        return name
