"""EfficientNet-Lite (Tan & Le 2019, arXiv 1905.11946): inverted residual blocks with ReLU6, no squeeze and excitation.

Larger sizes scale the width and depth of the smallest one. The published weights come from TensorFlow, so every
convolution uses TensorFlow's SAME padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

STEM_CHANNELS, HEAD_CHANNELS, CLASSES = 32, 1280, 1000  # the same in every size
CHANNEL_MULTIPLE = 8  # channel counts are rounded to a multiple of this
DROP_PATH = 0.2  # drop rate of the last block in training; it grows linearly from 0 at the first
NORM = {"eps": 1e-3, "momentum": 0.01}


@dataclass(frozen=True)
class Stage:
    """Blocks of one output resolution; only the first one applies the stride."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(repeats=1, kernel=3, stride=1, expansion=1, channels=16),
    Stage(repeats=2, kernel=3, stride=2, expansion=6, channels=24),
    Stage(repeats=2, kernel=5, stride=2, expansion=6, channels=40),
    Stage(repeats=3, kernel=3, stride=2, expansion=6, channels=80),
    Stage(repeats=3, kernel=5, stride=1, expansion=6, channels=112),
    Stage(repeats=4, kernel=5, stride=2, expansion=6, channels=192),
    Stage(repeats=1, kernel=3, stride=1, expansion=6, channels=320),
)


@dataclass(frozen=True)
class Scale:
    """Compound scaling relative to the smallest size."""

    width: float
    depth: float
    resolution: int  # pixels of the images it was trained on

    def channels(self, count: int) -> int:
        """The scaled channel count, rounded to CHANNEL_MULTIPLE but never below 90% of the unrounded one."""
        scaled = count * self.width
        rounded = int(scaled + CHANNEL_MULTIPLE / 2) // CHANNEL_MULTIPLE * CHANNEL_MULTIPLE
        return rounded if rounded >= 0.9 * scaled else rounded + CHANNEL_MULTIPLE


SCALES = {"efficientnet-lite0": Scale(1.0, 1.0, 224), "efficientnet-lite2": Scale(1.1, 1.2, 260)}


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding, which pads more on the right and at the bottom.

    The padding is fixed for the training resolution, because the weights were trained with it.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, size: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)
        missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)  # pixels in total, left and right
        self.before, self.after = missing // 2, missing - missing // 2

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(maps, (self.before, self.after) * 2) if self.after else maps)


class ConvNorm(nn.Module):
    """Convolution and batch norm, then ReLU6 unless it ends a block."""

    def __init__(self, convolution: SameConv2d, has_activation: bool = True):
        super().__init__()
        self.convolution = convolution
        self.norm: nn.Module = nn.BatchNorm2d(convolution.out_channels, **NORM)
        self.has_activation = has_activation

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        maps = self.norm(self.convolution(maps))
        return nn.functional.relu6(maps) if self.has_activation else maps

    def fold(self) -> None:
        """Folds the batch norm into the convolution: the same output in two thirds of the time on a CPU."""
        self.convolution, self.norm = fuse_conv_bn_eval(self.convolution, self.norm), nn.Identity()


class Block(nn.Module):
    """Inverted residual: expand, depthwise, project (MobileNetV2, Sandler et al. 2018, arXiv 1801.04381)."""

    def __init__(self, inputs: int, outputs: int, stage: Stage, stride: int, size: int, drop_path: float):
        super().__init__()
        wide = inputs * stage.expansion
        if stage.expansion > 1:
            self.expand = ConvNorm(SameConv2d(inputs, wide, 1, size))
        self.depthwise = ConvNorm(SameConv2d(wide, wide, stage.kernel, size, stride, groups=wide))
        self.project = ConvNorm(SameConv2d(wide, outputs, 1, size), has_activation=False)
        self.is_residual = stride == 1 and inputs == outputs
        self.drop_path = drop_path

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        wide = self.expand(maps) if hasattr(self, "expand") else maps
        narrow = self.project(self.depthwise(wide))
        if not self.is_residual:
            return narrow
        if self.training and self.drop_path:
            narrow = _drop_path(narrow, self.drop_path)
        return narrow + maps


class EfficientNet(nn.Module):
    """Pixels [batch, 3, height, width] → maps [batch, HEAD_CHANNELS, height / 32, width / 32].

    ``classifier`` is ImageNet's head on the average-pooled maps; ``forward`` does not apply it.

    Args:
        name: a key of ``SCALES``.
    """

    def __init__(self, name: str):
        super().__init__()
        scale = SCALES[name]
        self.stem = ConvNorm(SameConv2d(3, STEM_CHANNELS, 3, scale.resolution, stride=2))
        self.blocks = nn.ModuleList(_blocks(scale))
        last = scale.channels(STAGES[-1].channels)
        self.head = ConvNorm(SameConv2d(last, HEAD_CHANNELS, 1, math.ceil(scale.resolution / 32)))
        self.classifier: nn.Module = nn.Linear(HEAD_CHANNELS, CLASSES)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        maps = self.stem(pixels)
        for block in self.blocks:
            maps = block(maps)
        return self.head(maps)

    def fold_norms(self) -> None:
        """Folds every batch norm into the convolution before it. Requires evaluation mode."""
        for module in list(self.modules()):
            if isinstance(module, ConvNorm):
                module.fold()

    def load_published(self, tensors: dict[str, torch.Tensor]) -> None:
        """Loads weights with the tensor names of the published checkpoints.

        Raises:
            RuntimeError: a tensor is missing, unexpected or has another shape.
        """
        ours = {published_name(name): name for name in self.state_dict()}
        self.load_state_dict({ours.get(name, name): tensor for name, tensor in tensors.items()})

    def published_state(self) -> dict[str, torch.Tensor]:
        """The weights with the tensor names that ``load_published`` reads."""
        return {published_name(name): tensor for name, tensor in self.state_dict().items()}


# Our name -> the published one, which numbers the norms of a block.
_PUBLISHED = {
    "stem.convolution": "_conv_stem",
    "stem.norm": "_bn0",
    "expand.convolution": "_expand_conv",
    "expand.norm": "_bn0",
    "depthwise.convolution": "_depthwise_conv",
    "depthwise.norm": "_bn1",
    "project.convolution": "_project_conv",
    "project.norm": "_bn2",
    "head.convolution": "_conv_head",
    "head.norm": "_bn1",
    "classifier": "_fc",
}


def published_name(name: str) -> str:
    """Name of a tensor in published checkpoints: "blocks.3.expand.norm.bias" → "_blocks.3._bn0.bias"."""
    block, _, rest = name.removeprefix("blocks.").partition(".") if name.startswith("blocks.") else ("", "", name)
    part, _, kind = rest.rpartition(".")
    return (f"_blocks.{block}." if block else "") + f"{_PUBLISHED[part]}.{kind}"


def _blocks(scale: Scale) -> list[Block]:
    # Depth scaling leaves out the first and the last stage.
    repeats = [math.ceil(stage.repeats * scale.depth) for stage in STAGES]
    repeats[0], repeats[-1] = STAGES[0].repeats, STAGES[-1].repeats
    blocks: list[Block] = []
    inputs, size = STEM_CHANNELS, math.ceil(scale.resolution / 2)
    for stage, count in zip(STAGES, repeats, strict=True):
        for index in range(count):
            stride = 1 if index else stage.stride
            outputs = scale.channels(stage.channels)
            drop_path = DROP_PATH * len(blocks) / sum(repeats)
            blocks.append(Block(inputs, outputs, stage, stride, size, drop_path))
            inputs, size = outputs, math.ceil(size / stride)
    return blocks


def _drop_path(maps: torch.Tensor, probability: float) -> torch.Tensor:
    """Drops the residual branch for random images (stochastic depth, Huang et al. 2016, arXiv 1603.09382)."""
    keep = 1 - probability
    is_kept = (keep + torch.rand(len(maps), 1, 1, 1, dtype=maps.dtype, device=maps.device)).floor()
    return maps / keep * is_kept
