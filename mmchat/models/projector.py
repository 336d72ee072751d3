"""Projector: image features → input embeddings of the language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..presets import PROJECTOR_KINDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OLD_NAMES = {  # in saved configs
    "image_width": "image_dim",
    "hidden_width": "intermediate_size",
    "token_width": "hidden_size",
    "marker": "end_of_image_token",
}


@dataclass(frozen=True)
class ProjectorConfig:
    """The shape of a projector, saved with its weights.

    Kinds:
        linear: one linear layer, as in LLaVA (Liu et al. 2023, arXiv 2304.08485).
        llava: Linear, GELU, Linear, as in LLaVA-1.5 (arXiv 2310.03744); the kind that can be exported.
        mlp: LayerNorm, then the same.
        resblock: a linear layer, then x + mlp(x), where mlp is the kind above.
        normblocks: a linear layer and a LayerNorm, then ``depth`` times x + mlp(x) without a norm. With a depth of one
            it is the residual block of LLaVA's code, ``x = norm(x); x + mlp(x)``, which published checkpoints have.
    """

    kind: str
    image_dim: int  # size of one feature vector
    intermediate_size: int  # between two linear layers; not used by ``linear``
    hidden_size: int  # the language model's
    feature_count: int  # of one image
    end_of_image_token: bool = False  # a learned token follows every image
    depth: int = 1  # residual blocks of ``normblocks``
    dropout: float = 0.0  # after each GELU, in training
    activation: str = "gelu"  # of ``llava``, as transformers names it
    bias: bool = True  # of ``llava``

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> ProjectorConfig:
        """The config in a weights folder; configs written by older versions are accepted.

        Raises:
            TypeError, ValueError: it is not a mapping, or a field is missing or unknown.
        """
        return cls(**{OLD_NAMES.get(name, name): value for name, value in dict(stored).items()})

    @property
    def tokens_per_image(self) -> int:
        return self.feature_count + self.end_of_image_token


class LlavaProjector(nn.Module):
    """Linear → GELU (or another activation) → Linear, under the names that transformers' Llava gives them."""

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.image_dim, config.intermediate_size, bias=config.bias)
        self.act = _gelu(config.dropout) if config.activation == "gelu" else _activation(config.activation)
        self.linear_2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(features)))  # [images, features, hidden_size]


class MlpProjector(nn.Module):
    """LayerNorm → Linear → GELU → Linear."""

    def __init__(self, input_size: int, intermediate_size: int, output_size: int, dropout: float = 0.0):
        super().__init__()
        self.pre_norm = nn.LayerNorm(input_size)
        self.proj = _mlp(input_size, intermediate_size, output_size, dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.proj(self.pre_norm(features))  # [images, features, output_size]


class ResblockProjector(nn.Module):
    """A linear layer to the hidden size, then x + mlp(LayerNorm(x))."""

    def __init__(self, image_dim: int, intermediate_size: int, hidden_size: int, dropout: float = 0.0):
        super().__init__()
        self.linear = nn.Linear(image_dim, hidden_size)
        self.mlp = MlpProjector(hidden_size, intermediate_size, hidden_size, dropout)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        tokens = self.linear(features)  # [images, features, hidden_size]
        return tokens + self.mlp(tokens)


class NormblocksProjector(nn.Module):
    """Linear and LayerNorm, then residual blocks. The skip connection starts after the norm."""

    def __init__(self, image_dim: int, intermediate_size: int, hidden_size: int, depth: int = 1, dropout: float = 0.0):
        super().__init__()
        self.linear = nn.Linear(image_dim, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.blocks = nn.ModuleList(_mlp(hidden_size, intermediate_size, hidden_size, dropout) for _ in range(depth))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(self.linear(features))  # [images, features, hidden_size]
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return tokens


def _gelu(dropout: float) -> nn.Module:
    """GELU and dropout as one module, so that dropout does not renumber the layers around it."""
    return nn.Sequential(nn.GELU(), nn.Dropout(dropout)) if dropout else nn.GELU()


def _activation(name: str) -> nn.Module:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(f"'{name}' is not an activation that transformers knows")
    return ACT2FN[name]


def _mlp(input_size: int, intermediate_size: int, output_size: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(input_size, intermediate_size), _gelu(dropout), nn.Linear(intermediate_size, output_size)
    )


class WithEndOfImage(nn.Module):
    """Appends a learned end-of-image token to each image: [images, n, …] → [images, n + 1, hidden_size]."""

    def __init__(self, projector: nn.Module, hidden_size: int):
        super().__init__()
        self.projector = projector
        self.marker = nn.Parameter(torch.zeros(hidden_size))  # the tensor's name in saved weights

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        tokens = self.projector(features)  # [images, n, hidden_size]
        return torch.cat([tokens, self.marker.expand(len(tokens), 1, -1)], dim=1)


def build_projector(config: ProjectorConfig) -> nn.Module:
    """A projector with fresh weights: [images, features, image_dim] → [images, tokens_per_image, hidden_size].

    Raises:
        ValueError: the config names a kind that does not exist.
    """
    sizes = config.image_dim, config.intermediate_size, config.hidden_size
    if config.kind == "linear":
        projector = nn.Linear(config.image_dim, config.hidden_size)
    elif config.kind == "llava":
        projector = LlavaProjector(config)
    elif config.kind == "mlp":
        projector = MlpProjector(*sizes, config.dropout)
    elif config.kind == "resblock":
        projector = ResblockProjector(*sizes, config.dropout)
    elif config.kind == "normblocks":
        projector = NormblocksProjector(*sizes, config.depth, config.dropout)
    else:
        raise ValueError(f"'{config.kind}' is not a kind of projector; the kinds are {', '.join(PROJECTOR_KINDS)}")
    return WithEndOfImage(projector, config.hidden_size) if config.end_of_image_token else projector


@torch.no_grad()
def init_end_of_image(
    projector: nn.Module, language_model: nn.Module, tokenizer: PreTrainedTokenizerFast, text: str = "\n"
) -> None:
    """Initializes the end-of-image token with the embedding of an existing token.

    Args:
        projector: one with an end-of-image token.
        text: its last token gives the embedding; by default, a line break.
    """
    token_id = tokenizer.encode(text, add_special_tokens=False)[-1]
    embedding = language_model.get_input_embeddings().weight[token_id]  # [hidden_size]
    projector.marker.copy_(embedding)
