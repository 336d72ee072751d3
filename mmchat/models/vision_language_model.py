"""The multimodal model: a language model that reads projected picture features among its tokens."""

from __future__ import annotations

import torch
from torch import nn

from .projector import ProjectorConfig
from .prompt import IMAGE_TOKEN_ID
from .tagger import Tagger

IGNORE_INDEX = -100  # the label that transformers' losses leave out


class MultimodalModel(nn.Module):
    """A causal language model, a LoRA adapter on it, and a projector beside it.

    The projector is a plain module outside PEFT, which freezes what it does not know.
    """

    accepts_loss_kwargs = True  # tells transformers' Trainer to pass num_items_in_batch

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
        return hasattr(self.language_model, "peft_config")

    @property
    def tokens_per_image(self) -> int:
        """How many tokens a picture takes in a row."""
        return self.projector_config.tokens_per_image

    @property
    def device(self) -> torch.device:
        return next(self.projector.parameters()).device

    def tags(self, image_features: torch.Tensor) -> str:
        """What the language model is told of a picture in words, from its features, [features, image_width]."""
        return self.tagger.text(image_features) if self.tagger else ""

    def splice(self, token_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        """Token ids with pictures in their places → input embeddings.

        Args:
            token_ids: [batch, length], IMAGE_TOKEN_ID where a picture's feature goes.
            image_features: [images, features, image_width] in reading order, or None where there is no picture; a
                projector with a marker makes one token more than there are features.

        Returns:
            [batch, length, token_width] in the language model's number format.

        Raises:
            ValueError: the number of places and the number of features differ.
        """
        is_image = token_ids == IMAGE_TOKEN_ID  # [batch, length]
        embeddings = self.language_model.get_input_embeddings()(token_ids.masked_fill(is_image, 0))
        if image_features is None:
            image_tokens = embeddings.new_empty(0, 0, embeddings.shape[-1])
        else:
            projector_dtype = next(self.projector.parameters()).dtype
            image_tokens = self.projector(image_features.to(projector_dtype))  # [images, tokens, token_width]
        count = image_tokens.shape[0] * image_tokens.shape[1]
        if int(is_image.sum()) != count:
            raise ValueError(f"{int(is_image.sum())} places for picture tokens, but {count} tokens")
        return embeddings.masked_scatter(is_image.unsqueeze(-1), image_tokens.to(embeddings.dtype))

    def forward(
        self,
        num_items_in_batch: torch.Tensor | int | None = None,
        label_weights: torch.Tensor | None = None,
        **batch: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The training loss: cross-entropy of each labelled token, predicted from the token before it.

        Args:
            num_items_in_batch: what the sum of losses is divided by; the number of labels if None.
            label_weights: [labels], what each label's loss is multiplied by; below 0 it becomes less likely.
            batch: as ``label_logits`` takes it.
        """
        logits, expected = self.label_logits(**batch)
        losses = nn.functional.cross_entropy(logits.float(), expected, reduction="none")  # [labels]
        if label_weights is not None:
            losses = losses * label_weights
        count = len(expected) if num_items_in_batch is None else num_items_in_batch
        return {"loss": losses.sum() / max(count, 1)}

    def label_logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        parent: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is predicted where a label stands, [labels, vocabulary], and the labels, [labels].

        Logits are the costliest part of a small model, so no others are computed.

        Args:
            input_ids, labels: [batch, length]; a label stands where its token stands, IGNORE_INDEX elsewhere.
            attention_mask: [batch, length], 1 for tokens; or [batch, 1, length, length], true where the row's token
                reads the column's.
            position_ids: [batch, length]; 0, 1, 2, … if None.
            parent: [batch, length], the index of the token before each one; one to the left if None.
            image_features: [images, features, image_width], or None.
        """
        decoder = self.causal_language_model.get_decoder()
        hidden = decoder(
            inputs_embeds=self.splice(input_ids, image_features),
            attention_mask=self._readable(attention_mask),
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state  # [batch, length, token_width]
        if parent is None:
            parent = torch.arange(-1, labels.shape[1] - 1, device=labels.device).expand_as(labels)
        row, column = (labels != IGNORE_INDEX).nonzero(as_tuple=True)  # [labels] each
        logits = self.causal_language_model.get_output_embeddings()(hidden[row, parent[row, column]])
        return logits, labels[row, column]

    @property
    def causal_language_model(self) -> nn.Module:
        """The language model with its adapter, without PEFT's wrapper."""
        model = self.language_model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _readable(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """A mask of four dimensions as the attention function wants it: truth values for sdpa, else addends."""
        if attention_mask.dim() == 2 or self.causal_language_model.config._attn_implementation == "sdpa":
            return attention_mask
        dtype = self.causal_language_model.dtype
        return torch.zeros_like(attention_mask, dtype=dtype).masked_fill(~attention_mask, torch.finfo(dtype).min)
