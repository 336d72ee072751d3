"""Conversations → batches: tokenised, with the features of their pictures, common beginnings laid out only once."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from ...errors import BadInput
from ...models.prompt import IMAGE_TOKEN_ID, ChatFormat, EncodedConversation, encode, no_text
from ...models.vision_language_model import IGNORE_INDEX
from .conversations import Conversation

logger = logging.getLogger(__name__)


class Features(Protocol):
    """Features of pictures by name: a ``FeatureStore``, or a ``PictureFolder``."""

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> torch.Tensor: ...


@dataclass
class PackedSequence:
    """Conversations about the same pictures, packed into one sequence of tokens.

    Their tokens form a tree: the picture and the words that several conversations begin with stand in the sequence
    once, and each goes on from there. A token attends to those on its own way from the root and no others, so the model
    computes for each conversation exactly what it would compute for it alone. A single conversation is a tree of one
    branch.
    """

    token_ids: list[int] = field(default_factory=list)  # depth first: a branch is whole before the next one begins
    is_answer: list[bool] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)  # index of the token before it in its conversation; -1 for none
    position: list[int] = field(default_factory=list)  # how many tokens come before it in its conversation
    subtree_end: list[int] = field(default_factory=list)  # index after the last token that attends to this one
    weight: list[float] = field(default_factory=list)  # of its loss
    images: list[str] = field(default_factory=list)  # in the order of their IMAGE_TOKEN_IDs
    open_questions: list[Any] = field(default_factory=list)  # taken out of it, to be rewarded (self_critical.py)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_branched(self) -> bool:
        return any(parent != index - 1 for index, parent in enumerate(self.parent))

    @property
    def is_weighted(self) -> bool:
        return any(weight != 1 for weight in self.weight)

    def without(self, indices: set[int]) -> PackedSequence:
        """The sequence without whole branches, which show no picture of their own."""
        kept = [index for index in range(len(self)) if index not in indices]
        now_at = {index: position for position, index in enumerate(kept)} | {-1: -1}
        return PackedSequence(
            token_ids=[self.token_ids[index] for index in kept],
            is_answer=[self.is_answer[index] for index in kept],
            parent=[now_at[self.parent[index]] for index in kept],
            position=[self.position[index] for index in kept],
            subtree_end=[bisect_left(kept, self.subtree_end[index]) for index in kept],
            weight=[self.weight[index] for index in kept],
            images=self.images,
        )


def lay_out(
    conversations: Sequence[EncodedConversation], max_length: int, weights: Sequence[float] | None = None
) -> list[PackedSequence]:
    """Conversations about the same pictures → sequences of at most ``max_length`` tokens.

    Sorted, those that begin alike are neighbors, so each has to be compared with the one before it only. Answers are
    never shared: each of their tokens is learned once for each conversation that has it.

    Args:
        weights: what the loss of each conversation is multiplied by; 1 if None.
    """
    rows: list[PackedSequence] = []
    path: list[int] = []  # indices in the sequence of the tokens of the conversation packed last
    last: EncodedConversation | None = None
    weighted = zip(conversations, weights or [1.0] * len(conversations), strict=True)
    for conversation, weight in sorted(weighted, key=lambda pair: pair[0].token_ids):
        shared = _shared_length(last, conversation) if last else 0
        if not rows or len(rows[-1]) + len(conversation.token_ids) - shared > max_length:
            rows.append(PackedSequence())
            path, shared = [], 0
        row = rows[-1]
        shown = sum(token_id == IMAGE_TOKEN_ID for token_id in conversation.token_ids[:shared])
        shown_images = shown * len(conversation.images) // max(conversation.token_ids.count(IMAGE_TOKEN_ID), 1)
        row.images += conversation.images[shown_images:]
        path = path[:shared]
        for position in range(shared, len(conversation.token_ids)):
            row.token_ids.append(conversation.token_ids[position])
            row.is_answer.append(conversation.is_answer[position])
            row.parent.append(path[-1] if path else -1)
            row.position.append(position)
            row.subtree_end.append(0)
            row.weight.append(weight)
            path.append(len(row) - 1)
        for index in path:
            row.subtree_end[index] = len(row)
        last = conversation
    return rows


def _shared_length(first: EncodedConversation, second: EncodedConversation) -> int:
    """How many tokens two conversations begin with alike, before either answers."""
    pairs = zip(first.token_ids, second.token_ids, first.is_answer, second.is_answer, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1] and not (pair[2] or pair[3]), pairs))


class ConversationDataset(Dataset):
    """Rows of conversations with the features of their pictures.

    Args:
        conversations: of one or many pictures; neighbours that show the same pictures share a row.
        features: of every picture that is shown.
        tokens_per_image: how many tokens the projector makes of one picture.
        max_length: in tokens; what is longer is cut off at its end.
        share: whether conversations about the same pictures share a row.
        image_text: what is said about a picture after it, such as its tags.

    Raises:
        BadInput: a picture has no features, or nothing is left to learn from.
    """

    def __init__(
        self,
        conversations: Iterable[Conversation],
        features: Features,
        tokenizer: Any,
        chat_format: ChatFormat,
        tokens_per_image: int,
        *,
        max_length: int = 1024,
        share: bool = True,
        image_text: Callable[[str], str] = no_text,
    ):
        self.features = features
        groups: dict[Any, list[EncodedConversation]] = {}
        self.count = cut = 0
        for number, conversation in enumerate(conversations):
            for name in conversation.images:
                if name not in features:
                    raise BadInput(f"Conversation {conversation.id} shows '{name}', which has no features.")
            encoded = encode(conversation.messages, tokenizer, chat_format, tokens_per_image, image_text=image_text)
            if len(encoded.token_ids) > max_length:
                encoded, cut = _cut(encoded, max_length), cut + 1
            if any(encoded.is_answer):
                groups.setdefault(conversation.images if share and conversation.images else number, []).append(encoded)
                self.count += 1
        if cut:
            logger.warning("%d conversations were longer than %d tokens and were cut off there", cut, max_length)
        if not groups:
            raise BadInput(f"No conversation has an answer within its first {max_length} tokens.")
        self.rows = [row for group in groups.values() for row in lay_out(group, max_length)]

    def with_rows(self, rows: list[PackedSequence]) -> ConversationDataset:
        """A dataset with other rows and the same features."""
        changed = copy(self)
        changed.rows = rows
        return changed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        features = [self.features[name] for name in row.images]
        return {"row": row, "features": torch.stack(features) if features else None}


def _cut(encoded: EncodedConversation, length: int) -> EncodedConversation:
    if IMAGE_TOKEN_ID in encoded.token_ids[length:]:
        return EncodedConversation([], [], [])  # part of a picture would be left
    return EncodedConversation(encoded.token_ids[:length], encoded.is_answer[:length], encoded.images)


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows → what ``MultimodalModel.forward`` takes, padded on the right."""
    rows = [example["row"] for example in examples]

    def pad(name: str, value: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
        columns = [torch.tensor(getattr(row, name), dtype=dtype) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=value)

    token_ids = pad("token_ids", 0)  # [batch, length]
    index = torch.arange(token_ids.shape[1])  # [length]
    is_token = index < torch.tensor([[len(row)] for row in rows])  # [batch, length]
    batch = {
        "input_ids": token_ids,
        "labels": token_ids.where(pad("is_answer", 0).bool(), IGNORE_INDEX),
        "attention_mask": is_token.long(),
    }
    if any(row.is_branched for row in rows):
        end = pad("subtree_end", 0).where(is_token, index + 1)  # padding attends to itself, or it would become NaN
        reads = (index <= index[:, None]) & (index[:, None] < end[:, None, :])  # [batch, length, length]
        batch |= {
            "attention_mask": reads[:, None],
            "position_ids": pad("position", 0),
            "parent": pad("parent", 0),
        }
    if any(row.is_weighted for row in rows):
        batch["label_weights"] = pad("weight", 0, torch.float32)[batch["labels"] != IGNORE_INDEX]  # [labels]
    features = [example["features"] for example in examples if example["features"] is not None]
    if features:
        batch["image_features"] = torch.cat(features).float()  # [images, features, image_width]
    return batch
