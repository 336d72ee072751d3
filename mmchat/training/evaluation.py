"""Answers to a file of questions, measured; and again with other pictures, to see what language alone can guess."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..errors import BadInput
from ..generation import SamplingOptions, generate_texts
from ..model import IGNORED, MultimodalModel
from ..prompt import ChatFormat, Message, encode
from .conversations import Conversation, conversation_of, stream_entries
from .data import ConversationDataset, Features, collate
from .metrics import (
    Estimate,
    bootstrap,
    caption_metrics,
    count_metrics,
    detail_metrics,
    is_hedged,
    metrics_for,
    name_metrics,
    share,
)

logger = logging.getLogger(__name__)

REAL, SHUFFLED, BLANK = CONDITIONS = ("real", "shuffled", "blank")
DESCRIPTIONS = {"caption": caption_metrics, "detail": detail_metrics}  # kinds that are scored against all references
HOW_MANY = "how many"
MAX_NEW_TOKENS = {"detail": 96}  # the longest answer of a kind that needs more than DEFAULT_MAX_NEW_TOKENS
DEFAULT_MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Item:
    """A question with its right answer, and, of a caption, everything people wrote."""

    conversation: Conversation  # its last message is the right answer
    kind: str
    references: tuple[str, ...]
    accepted: tuple[str, ...] = ()  # where a thing has several right names: all of them

    @property
    def question(self) -> tuple[Message, ...]:
        return self.conversation.messages[:-1]

    @property
    def answer(self) -> str:
        return self.conversation.messages[-1].text


def read_items(path: str | Path, limit: int | None = None) -> list[Item]:
    """Questions to evaluate on: LLaVA-Instruct entries, which may have more fields.

    ``kind`` groups the questions; ``references`` are all texts that people wrote of the picture, and ``accepted`` all
    names that are right.

    In a conversation of several turns the last answer is measured, the others are read as history.

    Raises:
        BadInput: the file cannot be read, or an entry ends without an answer.
    """
    path = Path(path)
    items = []
    for line, entry in stream_entries(path):
        items.append(_item(entry, f"{path.name}, line {line}"))
        if len(items) == limit:
            break
    if not items:
        raise BadInput(f"{path.name} holds no questions.")
    return items


def _item(entry: Any, place: str) -> Item:
    conversation = conversation_of(entry, place)
    if conversation.messages[-1].role != "assistant":
        raise BadInput(f"{place}: the conversation must end with the right answer.")
    references, accepted = (_texts(entry, field, place) for field in ("references", "accepted"))
    kind = entry.get("kind") or ("caption" if references else "answer")
    if not isinstance(kind, str):
        raise BadInput(f'{place}: "kind" must be a text.')
    return Item(conversation, kind, references or (conversation.messages[-1].text,), accepted)


def _texts(entry: dict, field: str, place: str) -> tuple[str, ...]:
    texts = entry.get(field)
    if texts is None:
        return ()
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadInput(f'{place}: "{field}" must be a list of texts.')
    return tuple(texts)


class ShuffledFeatures:
    """Every picture in place of another: each name gets the features of the next one."""

    def __init__(self, features: Features, names: Sequence[str]):
        self.features = features
        unique = list(dict.fromkeys(names))
        # Half a collection further on: neighbours may be alike, as pictures of one series are.
        self.other = {
            name: unique[(place + max(len(unique) // 2, 1)) % len(unique)] for place, name in enumerate(unique)
        }

    def __contains__(self, name: str) -> bool:
        return name in self.other

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.features[self.other[name]]


class BlankFeatures:
    """An even gray in place of every picture."""

    def __init__(self, encoder: Any):
        self.blank = encoder.encode([Image.new("RGB", (256, 256), (128, 128, 128))])[0]

    def __contains__(self, name: str) -> bool:
        return True

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.blank


class Evaluator:
    """One model, asked many questions at once.

    Args:
        model, tokenizer, chat_format: as training and chat use them.
        progress: wraps an iterator of known length, as tqdm does.
    """

    def __init__(
        self,
        model: MultimodalModel,
        tokenizer: Any,
        chat_format: ChatFormat,
        *,
        batch_size: int = 32,
        progress: Callable[[Iterable, str], Iterable] = lambda batches, _: batches,
    ):
        self.model, self.tokenizer, self.chat_format = model.eval(), tokenizer, chat_format
        self.batch_size = batch_size
        self.progress = progress

    @torch.inference_mode()
    def answers(self, items: Sequence[Item], features: Features, options: SamplingOptions) -> list[str]:
        """What the model answers, greedily or by beam search, in the order of ``items``."""
        prompts = [self._encode(item) for item in items]
        order = sorted(range(len(items)), key=lambda place: len(prompts[place].token_ids))  # like lengths together
        result = [""] * len(items)
        for places in self.progress(_batches(order, self.batch_size), "answering"):
            embeddings = [self._embed(prompts[place], features) for place in places]
            texts = generate_texts(self.model.language_model, self.tokenizer, embeddings, options)
            for place, text in zip(places, texts, strict=True):
                result[place] = text
        return result

    @torch.inference_mode()
    def perplexity(self, items: Sequence[Item], features: Features) -> Estimate:
        """e to the mean loss of a token of the right answers; lower is better, 1 is certainty."""
        dataset = ConversationDataset(
            [item.conversation for item in items],
            features,
            self.tokenizer,
            self.chat_format,
            self.model.tokens_per_image,
            share=False,
        )
        order = sorted(range(len(dataset)), key=lambda place: len(dataset.rows[place]))
        losses, counts = [], []
        for places in self.progress(_batches(order, self.batch_size), "perplexity"):
            batch = {
                name: tensor.to(self.model.device) for name, tensor in collate([dataset[p] for p in places]).items()
            }
            logits, expected = self.model.label_logits(**batch)
            loss = torch.nn.functional.cross_entropy(logits.float(), expected, reduction="none")
            per_row = (batch["labels"] != IGNORED).sum(dim=1).tolist()  # [batch]
            losses += [part.sum().item() for part in loss.split(per_row)]
            counts += per_row
        loss, count = torch.tensor(losses, dtype=torch.float64).numpy(), torch.tensor(counts).numpy()
        return bootstrap(len(loss), lambda sample: exp(loss[sample].sum() / count[sample].sum()))

    def _encode(self, item: Item):
        tokens_per_image = self.model.tokens_per_image
        return encode(item.question, self.tokenizer, self.chat_format, tokens_per_image, open_reply=True)

    def _embed(self, prompt: Any, features: Features) -> torch.Tensor:
        """[length, token_width]."""
        device = self.model.device
        found = [features[name].to(device).float() for name in prompt.images]
        token_ids = torch.tensor([prompt.token_ids], device=device)
        return self.model.splice(token_ids, torch.stack(found) if found else None)[0]


def measure(items: Sequence[Item], answers: Sequence[str]) -> dict[str, dict[str, Estimate]]:
    """Kind of question → metric → figure.

    Where any answer hedges, the share that does and the accuracy of the others are among the metrics.
    """
    result = {}
    for kind in dict.fromkeys(item.kind for item in items):
        chosen = [(item, answer) for item, answer in zip(items, answers, strict=True) if item.kind == kind]
        score = _score_of(kind, [item for item, _ in chosen])
        result[kind] = score(*zip(*chosen, strict=True))
        hedged = [is_hedged(answer) for _, answer in chosen]
        if any(hedged):
            result[kind]["hedged"] = share(hedged)
            flat = [pair for pair, is_so in zip(chosen, hedged, strict=True) if not is_so]
            if flat and "accuracy" in result[kind]:
                result[kind]["accuracy, not hedged"] = score(*zip(*flat, strict=True))["accuracy"]
    return result


def _score_of(kind: str, items: Sequence[Item]) -> Callable[[Sequence[Item], Sequence[str]], dict[str, Estimate]]:
    """What computes the metrics of a kind, from items of it and their answers."""
    if kind in DESCRIPTIONS:
        return lambda items, said: DESCRIPTIONS[kind](said, [item.references for item in items])
    if any(item.accepted for item in items):
        return lambda items, said: name_metrics(said, [(*item.accepted, item.answer) for item in items])
    metrics = count_metrics if kind == HOW_MANY else metrics_for([item.answer for item in items])
    return lambda items, said: metrics(said, [item.answer for item in items])


def _batches(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def condition_features(
    condition: str, features: Features, items: Sequence[Item], encoder: Callable[[], Any]
) -> Features:
    """The features that are shown under a condition; the encoder is loaded only where it is needed."""
    if condition == SHUFFLED:
        return ShuffledFeatures(features, [name for item in items for name in item.conversation.images])
    return BlankFeatures(encoder()) if condition == BLANK else features


def flatten(results: dict[str, dict[str, Estimate]]) -> Iterator[tuple[str, str, Estimate]]:
    """(kind, metric, figure), one after the other."""
    for kind, metrics in results.items():
        for metric, estimate in metrics.items():
            yield kind, metric, estimate
