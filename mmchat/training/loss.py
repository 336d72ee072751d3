"""The training loss: next-token cross-entropy over the answer tokens."""

from __future__ import annotations

import torch
from torch.nn import functional


def next_token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The cross-entropy of the labels, summed and divided: a scalar.

    Args:
        logits: [labels, vocabulary], each row the prediction of its label.
        labels: [labels], token ids. There is no shift: the model has already paired each label with its logits.
        num_items_in_batch: the divisor, such as the number of labels in all batches of an optimizer step; the number
            of these labels if None.
        label_weights: [labels], factors for the loss of each label; a negative one lowers the token's probability.
        label_smoothing: the share of probability spread over the whole vocabulary.
    """
    losses = functional.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)
    if label_weights is not None:
        losses = losses * label_weights  # [labels]
    count = len(labels) if num_items_in_batch is None else num_items_in_batch
    return losses.sum() / max(count, 1)
