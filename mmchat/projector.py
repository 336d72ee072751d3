"""Picture features → tokens of the language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class ProjectorConfig:
    """What a projector is built from; saved with its weights.

    Kinds:
        linear: one linear layer, as in LLaVA (Liu et al. 2023, arXiv 2304.08485).
        mlp: LayerNorm, Linear, GELU, Linear, as in LLaVA-1.5 (arXiv 2310.03744) with a norm before it.
        resblock: a linear layer, then x + mlp(x).
    """

    kind: str
    image_width: int
    hidden_width: int  # inside the mlp; not used by ``linear``
    token_width: int


class Mlp(nn.Module):
    """LayerNorm → Linear → GELU → Linear."""

    def __init__(self, input_width: int, hidden_width: int, output_width: int):
        super().__init__()
        self.pre_norm = nn.LayerNorm(input_width)
        self.proj = nn.Sequential(
            nn.Linear(input_width, hidden_width), nn.GELU(), nn.Linear(hidden_width, output_width)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.proj(self.pre_norm(features))


class ResidualBlock(nn.Module):
    """A linear layer into the token width, then x + mlp(x)."""

    def __init__(self, input_width: int, hidden_width: int, output_width: int):
        super().__init__()
        self.linear = nn.Linear(input_width, output_width)
        self.mlp = Mlp(output_width, hidden_width, output_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        tokens = self.linear(features)
        return tokens + self.mlp(tokens)


def build_projector(config: ProjectorConfig) -> nn.Module:
    """A projector with fresh weights: [..., image_width] → [..., token_width].

    Raises:
        ValueError: the config names a kind that does not exist.
    """
    widths = config.image_width, config.hidden_width, config.token_width
    if config.kind == "linear":
        return nn.Linear(config.image_width, config.token_width)
    if config.kind == "mlp":
        return Mlp(*widths)
    if config.kind == "resblock":
        return ResidualBlock(*widths)
    raise ValueError(f"'{config.kind}' is no kind of projector; the kinds are linear, mlp and resblock")
