"""Picture features → tokens of the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

KINDS = ("linear", "llava", "mlp", "resblock", "normblocks")


@dataclass(frozen=True)
class ProjectorConfig:
    """The shape of a projector, saved with its weights.

    Kinds:
        linear: one linear layer, as in LLaVA (Liu et al. 2023, arXiv 2304.08485).
        llava: Linear, GELU, Linear, as in LLaVA-1.5 (arXiv 2310.03744); the kind that can be exported.
        mlp: the same behind a LayerNorm.
        resblock: a linear layer, then x + mlp(LayerNorm(x)), as weights of ours were trained.
        normblocks: a linear layer and a LayerNorm, then ``depth`` times x + mlp(x). With a depth of one it is the
            residual block of LLaVA's code, ``x = norm(x); x + mlp(x)``, which published checkpoints have.
    """

    kind: str
    image_width: int
    hidden_width: int  # between the two layers; not used by ``linear``
    token_width: int
    feature_count: int  # of one picture
    marker: bool = False  # a learned end-of-image token follows every picture
    depth: int = 1  # residual blocks of ``normblocks``
    dropout: float = 0.0  # behind each GELU, in training
    activation: str = "gelu"  # of ``llava``, as transformers names it
    bias: bool = True  # of ``llava``

    @property
    def tokens_per_image(self) -> int:
        return self.feature_count + self.marker


class TwoLayers(nn.Module):
    """Linear → GELU (or another activation) → Linear, under the names that transformers' Llava gives them."""

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.image_width, config.hidden_width, bias=config.bias)
        self.act = _gelu(config.dropout) if config.activation == "gelu" else _activation(config.activation)
        self.linear_2 = nn.Linear(config.hidden_width, config.token_width, bias=config.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(features)))


class Mlp(nn.Module):
    """LayerNorm → Linear → GELU → Linear."""

    def __init__(self, input_width: int, hidden_width: int, output_width: int, dropout: float = 0.0):
        super().__init__()
        self.pre_norm = nn.LayerNorm(input_width)
        self.proj = _mlp(input_width, hidden_width, output_width, dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.proj(self.pre_norm(features))


class ResidualBlock(nn.Module):
    """A linear layer into the token width, then x + mlp(LayerNorm(x))."""

    def __init__(self, input_width: int, hidden_width: int, output_width: int, dropout: float = 0.0):
        super().__init__()
        self.linear = nn.Linear(input_width, output_width)
        self.mlp = Mlp(output_width, hidden_width, output_width, dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        tokens = self.linear(features)
        return tokens + self.mlp(tokens)


class NormalizedBlocks(nn.Module):
    """Linear and LayerNorm, then residual blocks. The skip connection starts after the norm."""

    def __init__(self, input_width: int, hidden_width: int, output_width: int, depth: int = 1, dropout: float = 0.0):
        super().__init__()
        self.linear = nn.Linear(input_width, output_width)
        self.norm = nn.LayerNorm(output_width)
        self.blocks = nn.ModuleList(_mlp(output_width, hidden_width, output_width, dropout) for _ in range(depth))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(self.linear(features))  # [images, features, output_width]
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return tokens


def _gelu(dropout: float) -> nn.Module:
    """GELU and dropout as one module, so that dropout does not renumber the layers around it."""
    return nn.Sequential(nn.GELU(), nn.Dropout(dropout)) if dropout else nn.GELU()


def _activation(name: str) -> nn.Module:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(f"'{name}' is no activation that transformers has")
    return ACT2FN[name]


def _mlp(input_width: int, hidden_width: int, output_width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(input_width, hidden_width), _gelu(dropout), nn.Linear(hidden_width, output_width))


class Marked(nn.Module):
    """Appends a learned end-of-image token to each picture: [images, n, …] → [images, n + 1, token_width]."""

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
        projector = TwoLayers(config)
    elif config.kind == "mlp":
        projector = Mlp(*widths, config.dropout)
    elif config.kind == "resblock":
        projector = ResidualBlock(*widths, config.dropout)
    elif config.kind == "normblocks":
        projector = NormalizedBlocks(*widths, config.depth, config.dropout)
    else:
        raise ValueError(f"'{config.kind}' is no kind of projector; the kinds are {', '.join(KINDS)}")
    return Marked(projector, config.token_width) if config.marker else projector


@torch.no_grad()
def start_marker(projector: nn.Module, language_model: nn.Module, tokenizer: Any, text: str = "\n") -> None:
    """Lets the end-of-image token start from the embedding of a token that the language model knows.

    Args:
        projector: one with a marker.
        text: its last token gives the embedding; by default, a line break.
    """
    token_id = tokenizer.encode(text, add_special_tokens=False)[-1]
    embedding = language_model.get_input_embeddings().weight[token_id]  # [token_width]
    projector.marker.copy_(embedding)
