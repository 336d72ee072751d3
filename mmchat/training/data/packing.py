"""Conversations → batches: tokenizes, packs conversations that share a prefix into one sequence, adds features."""

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
from ...models.chat_formats import ChatFormat
from ...models.prompt import IMAGE_TOKEN_ID, TokenizedConversation, no_text, tokenize_conversation
from ...models.vision_language_model import IGNORE_INDEX
from .llava_json import Conversation

logger = logging.getLogger(__name__)


class Features(Protocol):
    """Image features by file name: a ``FeatureStore`` or a ``PictureFolder``."""

    def __contains__(self, name: str) -> bool: ...

    def __getitem__(self, name: str) -> torch.Tensor: ...


@dataclass
class PackedSequence:
    """Conversations about the same pictures, packed into one sequence of tokens as an attention tree.

    The sequence holds a shared prefix once, such as the picture and a common question, and each conversation branches
    off from it. A token attends only to its ancestors, so the loss equals that of each conversation alone. A single
    conversation is a tree of one branch.
    """

    token_ids: list[int] = field(default_factory=list)  # depth first
    is_answer: list[bool] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)  # index of the previous token of the conversation; -1 at the root
    position: list[int] = field(default_factory=list)  # position id: the token's depth in the tree
    subtree_end: list[int] = field(default_factory=list)  # index after the last token that attends to this one
    weight: list[float] = field(default_factory=list)  # loss weight
    images: list[str] = field(default_factory=list)  # in the order of their IMAGE_TOKEN_IDs
    open_questions: list[Any] = field(default_factory=list)  # removed from the sequence, for SCST (self_critical.py)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_branched(self) -> bool:
        return any(parent != index - 1 for index, parent in enumerate(self.parent))

    @property
    def is_weighted(self) -> bool:
        return any(weight != 1 for weight in self.weight)

    def without(self, indices: set[int]) -> PackedSequence:
        """The sequence without the tokens at ``indices``, which must be whole branches without pictures."""
        kept = [index for index in range(len(self)) if index not in indices]
        new_index = {old: new for new, old in enumerate(kept)} | {-1: -1}
        return PackedSequence(
            token_ids=[self.token_ids[index] for index in kept],
            is_answer=[self.is_answer[index] for index in kept],
            parent=[new_index[self.parent[index]] for index in kept],
            position=[self.position[index] for index in kept],
            subtree_end=[bisect_left(kept, self.subtree_end[index]) for index in kept],
            weight=[self.weight[index] for index in kept],
            images=self.images,
        )


def lay_out(
    conversations: Sequence[TokenizedConversation], max_length: int, weights: Sequence[float] | None = None
) -> list[PackedSequence]:
    """Packs conversations about the same pictures into sequences of at most ``max_length`` tokens.

    Sorting puts conversations with a common prefix side by side, so each is compared only with the one before it.
    Answers are never shared: every answer token counts in the loss once per conversation.

    Args:
        weights: the loss weight of each conversation; 1 if None.
    """
    rows: list[PackedSequence] = []
    path: list[int] = []  # indices of the tokens of the last conversation, root first
    last: TokenizedConversation | None = None
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


def _shared_length(first: TokenizedConversation, second: TokenizedConversation) -> int:
    """Length of the common prefix of two conversations, up to the first answer token."""
    pairs = zip(first.token_ids, second.token_ids, first.is_answer, second.is_answer, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1] and not (pair[2] or pair[3]), pairs))


class ConversationDataset(Dataset):
    """Packed sequences of conversations, each with the features of its pictures.

    Args:
        conversations: may show any pictures; those that show the same ones share a sequence.
        features: the features of every picture.
        tokens_per_image: projector tokens per picture.
        max_length: maximum tokens in a sequence; longer conversations are truncated.
        pack: put conversations about the same pictures into one sequence.
        image_text: returns the text that follows a picture in the prompt, such as its tags.

    Raises:
        BadInput: a picture has no features, or no answer is left after truncation.
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
        pack: bool = True,
        image_text: Callable[[str], str] = no_text,
    ):
        self.features = features
        groups: dict[Any, list[TokenizedConversation]] = {}
        self.count = truncated = 0
        for index, conversation in enumerate(conversations):
            for name in conversation.images:
                if name not in features:
                    raise BadInput(f"Conversation {conversation.id} shows '{name}', which has no features.")
            encoded = tokenize_conversation(
                conversation.messages, tokenizer, chat_format, tokens_per_image, image_text=image_text
            )
            if len(encoded.token_ids) > max_length:
                encoded, truncated = _truncate(encoded, max_length), truncated + 1
            if any(encoded.is_answer):
                groups.setdefault(conversation.images if pack and conversation.images else index, []).append(encoded)
                self.count += 1
        if truncated:
            logger.warning("%d conversations were truncated to %d tokens", truncated, max_length)
        if not groups:
            raise BadInput(f"No conversation has an answer within its first {max_length} tokens: raise max_length.")
        self.rows = [row for group in groups.values() for row in lay_out(group, max_length)]

    def with_rows(self, rows: list[PackedSequence]) -> ConversationDataset:
        """A copy of the dataset with other sequences and the same features."""
        changed = copy(self)
        changed.rows = rows
        return changed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        features = [self.features[name] for name in row.images]
        return {"row": row, "features": torch.stack(features) if features else None}


def _truncate(encoded: TokenizedConversation, length: int) -> TokenizedConversation:
    if IMAGE_TOKEN_ID in encoded.token_ids[length:]:
        return TokenizedConversation([], [], [])  # the cut would leave part of a picture
    return TokenizedConversation(encoded.token_ids[:length], encoded.is_answer[:length], encoded.images)


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Stacks examples into a batch, padded on the right.

    Returns:
        The arguments of ``VisionLanguageModel.forward``, and ``label_weights``, [labels], if any weight is not 1.
    """
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
        end = pad("subtree_end", 0).where(is_token, index + 1)  # padding attends to itself; an empty row gives NaN
        attends = (index <= index[:, None]) & (index[:, None] < end[:, None, :])  # [batch, length, length]
        batch |= {
            "attention_mask": attends[:, None],
            "position_ids": pad("position", 0),
            "parent": pad("parent", 0),
        }
    if any(row.is_weighted for row in rows):
        batch["label_weights"] = pad("weight", 0, torch.float32)[batch["labels"] != IGNORE_INDEX]  # [labels]
    features = [example["features"] for example in examples if example["features"] is not None]
    if features:
        batch["image_features"] = torch.cat(features).float()  # [images, features, image_dim]
    return batch
