"""The vision-language model: a language model that reads image tokens among its text tokens."""

from __future__ import annotations

import torch
from torch import nn

from .language_model import base_model
from .projector import ProjectorConfig
from .prompt import IMAGE_TOKEN_ID
from .stored_language_model import has_adapter
from .tagger import Tagger

IGNORE_INDEX = -100  # PyTorch's default: no loss at this label


class VisionLanguageModel(nn.Module):
    """A causal language model, a LoRA adapter on it, and a projector beside it.

    The projector is a plain module outside PEFT, because PEFT freezes modules that it does not know.
    """

    def __init__(
        self,
        language_model: nn.Module,
        projector: nn.Module,
        projector_config: ProjectorConfig,
        tagger: Tagger | None = None,
    ):
        super().__init__()
        self.language_model = language_model
        self.projector = projector
        self.projector_config = projector_config
        self.tagger = tagger

    @property
    def has_adapter(self) -> bool:
        return has_adapter(self.language_model)

    @property
    def tokens_per_image(self) -> int:
        """Number of tokens that one image takes."""
        return self.projector_config.tokens_per_image

    @property
    def device(self) -> torch.device:
        return next(self.projector.parameters()).device

    def tags(self, image_features: torch.Tensor) -> str:
        """The tags of an image as text, from its features, [features, image_dim]; empty without a tagger."""
        return self.tagger.text(image_features) if self.tagger else ""

    def splice(self, token_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        """Embeds token ids and replaces each IMAGE_TOKEN_ID with a projected image token.

        Args:
            token_ids: [batch, length], with ``tokens_per_image`` IMAGE_TOKEN_IDs for every image.
            image_features: [images, features, image_dim] in reading order; None without images.

        Returns:
            Input embeddings [batch, length, hidden_size], in the language model's dtype.

        Raises:
            ValueError: the number of IMAGE_TOKEN_IDs differs from the number of image tokens.
        """
        is_image = token_ids == IMAGE_TOKEN_ID  # [batch, length]
        embeddings = self.language_model.get_input_embeddings()(token_ids.masked_fill(is_image, 0))
        if image_features is None:
            image_tokens = embeddings.new_empty(0, 0, embeddings.shape[-1])
        else:
            projector_dtype = next(self.projector.parameters()).dtype
            image_tokens = self.projector(image_features.to(projector_dtype))  # [images, tokens, hidden_size]
        count = image_tokens.shape[0] * image_tokens.shape[1]
        if int(is_image.sum()) != count:
            raise ValueError(f"{int(is_image.sum())} IMAGE_TOKEN_IDs, but {count} image tokens")
        return embeddings.masked_scatter(is_image.unsqueeze(-1), image_tokens.to(embeddings.dtype))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        parent: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits that predict the labels, [labels, vocabulary], and the labels, [labels].

        ``training/loss.py`` makes a loss of them. The output head is the costliest part of a small model, so it runs
        only where there is a label.

        Args:
            input_ids, labels: [batch, length]; a label has the same position as its token, IGNORE_INDEX elsewhere.
            attention_mask: [batch, length], 1 for tokens and 0 for padding; or [batch, 1, length, length], true where
                the row's token attends to the column's.
            position_ids: [batch, length]; 0, 1, 2, … if None.
            parent: [batch, length], the position of the token that precedes each one; the left neighbor if None.
            image_features: [images, features, image_dim], or None.
        """
        decoder = self.unwrapped_language_model.get_decoder()
        hidden = decoder(
            inputs_embeds=self.splice(input_ids, image_features),
            attention_mask=self._as_attention_mask(attention_mask),
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state  # [batch, length, hidden_size]
        if parent is None:
            parent = torch.arange(-1, labels.shape[1] - 1, device=labels.device).expand_as(labels)
        row, column = (labels != IGNORE_INDEX).nonzero(as_tuple=True)  # [labels] each
        logits = self.unwrapped_language_model.get_output_embeddings()(hidden[row, parent[row, column]])
        return logits, labels[row, column]

    @property
    def unwrapped_language_model(self) -> nn.Module:
        """The language model with its adapter layers, without PEFT's wrapper."""
        return base_model(self.language_model)

    def _as_attention_mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """A 4D mask in the form that the attention kernel takes: boolean for sdpa, additive for the others."""
        if attention_mask.dim() == 2 or self.unwrapped_language_model.config._attn_implementation == "sdpa":
            return attention_mask
        dtype = self.unwrapped_language_model.dtype
        return torch.zeros_like(attention_mask, dtype=dtype).masked_fill(~attention_mask, torch.finfo(dtype).min)
