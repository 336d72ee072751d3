"""Conversations → batches: tokenised, with the features of their pictures, common beginnings laid out only once."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
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
class Row:
    """Conversations about the same pictures, laid out as one row of tokens.

    Their tokens form a tree: the picture and the words that several conversations begin with stand in the row once,
    and each goes on from there. A token reads those on its own way from the root and no others, so the model computes
    for each conversation exactly what it would compute for it alone. A single conversation is a tree of one branch.
    """

    token_ids: list[int] = field(default_factory=list)  # depth first: a branch is whole before the next one begins
    is_answer: list[bool] = field(default_factory=list)
    previous: list[int] = field(default_factory=list)  # place of the token before it in its conversation; -1 for none
    position: list[int] = field(default_factory=list)  # how many tokens come before it in its conversation
    end: list[int] = field(default_factory=list)  # place after the last token that reads this one
    images: list[str] = field(default_factory=list)  # in the order of their IMAGE_TOKEN_IDs
    open_questions: list[Any] = field(default_factory=list)  # taken out of it, to be rewarded (self_critical.py)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_branched(self) -> bool:
        return any(place != index - 1 for index, place in enumerate(self.previous))

    def without(self, places: set[int]) -> Row:
        """The row without whole branches, which show no picture of their own."""
        kept = [place for place in range(len(self)) if place not in places]
        now_at = {place: number for number, place in enumerate(kept)} | {-1: -1}
        return Row(
            token_ids=[self.token_ids[place] for place in kept],
            is_answer=[self.is_answer[place] for place in kept],
            previous=[now_at[self.previous[place]] for place in kept],
            position=[self.position[place] for place in kept],
            end=[bisect_left(kept, self.end[place]) for place in kept],
            images=self.images,
        )


def lay_out(conversations: Sequence[EncodedConversation], max_length: int) -> list[Row]:
    """Conversations about the same pictures → rows of at most ``max_length`` tokens.

    Sorted, those that begin alike are neighbours, so each has to be compared with the one before it only. Answers are
    never shared: each of their tokens is learnt once for each conversation that has it.
    """
    rows: list[Row] = []
    path: list[int] = []  # places in the row of the tokens of the conversation laid out last
    last: EncodedConversation | None = None
    for conversation in sorted(conversations, key=lambda conversation: conversation.token_ids):
        shared = _shared_length(last, conversation) if last else 0
        if not rows or len(rows[-1]) + len(conversation.token_ids) - shared > max_length:
            rows.append(Row())
            path, shared = [], 0
        row = rows[-1]
        shown = sum(token_id == IMAGE_TOKEN_ID for token_id in conversation.token_ids[:shared])
        shown_images = shown * len(conversation.images) // max(conversation.token_ids.count(IMAGE_TOKEN_ID), 1)
        row.images += conversation.images[shown_images:]
        path = path[:shared]
        for position in range(shared, len(conversation.token_ids)):
            row.token_ids.append(conversation.token_ids[position])
            row.is_answer.append(conversation.is_answer[position])
            row.previous.append(path[-1] if path else -1)
            row.position.append(position)
            row.end.append(0)
            path.append(len(row) - 1)
        for place in path:
            row.end[place] = len(row)
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

    def pad(name: str, value: int) -> torch.Tensor:
        columns = [torch.tensor(getattr(row, name), dtype=torch.long) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=value)

    token_ids = pad("token_ids", 0)  # [batch, length]
    place = torch.arange(token_ids.shape[1])  # [length]
    is_token = place < torch.tensor([[len(row)] for row in rows])  # [batch, length]
    batch = {
        "input_ids": token_ids,
        "labels": token_ids.where(pad("is_answer", 0).bool(), IGNORE_INDEX),
        "attention_mask": is_token.long(),
    }
    if any(row.is_branched for row in rows):
        end = pad("end", 0).where(is_token, place + 1)  # padding reads itself: a row of zeros would become NaN
        reads = (place <= place[:, None]) & (place[:, None] < end[:, None, :])  # [batch, length, length]
        batch |= {
            "attention_mask": reads[:, None],
            "position_ids": pad("position", 0),
            "previous": pad("previous", 0),
        }
    features = [example["features"] for example in examples if example["features"] is not None]
    if features:
        batch["image_features"] = torch.cat(features).float()  # [images, features, image_width]
    return batch
