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
        llava: Linear, GELU, Linear, as in LLaVA-1.5 (arXiv 2310.03744); the kind that can be exported.
        mlp: the same behind a LayerNorm.
        resblock: a linear layer, then x + mlp(x).
    """

    kind: str
    image_width: int
    hidden_width: int  # between the two layers; not used by ``linear``
    token_width: int
    feature_count: int  # of one picture
    marker: bool = False  # one more token, learnt, that ends every picture

    @property
    def tokens_per_image(self) -> int:
        return self.feature_count + self.marker


class TwoLayers(nn.Module):
    """Linear → GELU → Linear, under the names that transformers' Llava gives them."""

    def __init__(self, input_width: int, hidden_width: int, output_width: int):
        super().__init__()
        self.linear_1 = nn.Linear(input_width, hidden_width)
        self.linear_2 = nn.Linear(hidden_width, output_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(features)))


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


class Marked(nn.Module):
    """A projector whose pictures end with a token of their own: [images, n, …] → [images, n + 1, token_width]."""

    def __init__(self, projector: nn.Module, token_width: int):
        super().__init__()
        self.projector = projector
        self.marker = nn.Parameter(torch.zeros(token_width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        tokens = self.projector(features)
        return torch.cat([tokens, self.marker.expand(len(tokens), 1, -1)], dim=1)


def build_projector(config: ProjectorConfig) -> nn.Module:
    """A projector with fresh weights: [images, features, image_width] → [images, tokens_per_image, token_width].

    Raises:
        ValueError: the config names a kind that does not exist.
    """
    widths = config.image_width, config.hidden_width, config.token_width
    if config.kind == "linear":
        projector = nn.Linear(config.image_width, config.token_width)
    elif config.kind == "llava":
        projector = TwoLayers(*widths)
    elif config.kind == "mlp":
        projector = Mlp(*widths)
    elif config.kind == "resblock":
        projector = ResidualBlock(*widths)
    else:
        raise ValueError(f"'{config.kind}' is no kind of projector; the kinds are linear, llava, mlp and resblock")
    return Marked(projector, config.token_width) if config.marker else projector
