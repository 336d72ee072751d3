"""Answers and scores files of questions, also with shuffled and blank pictures, to measure the language prior."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import exp
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image

from ...conversation import Message, SamplingOptions
from ...errors import BadInput
from ...inference.generation import generate_batch
from ...models.chat_formats import ChatFormat
from ...models.prompt import IMAGE_TOKEN_ID, TokenizedConversation, tokenize_conversation
from ...models.vision_language_model import VisionLanguageModel
from ..data.llava_json import Conversation, conversation_of, stream_entries
from ..data.packing import ConversationDataset, Features, PackedSequence, collate
from .metrics import (
    Estimate,
    answer_metrics,
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
DESCRIPTIONS = {"caption": caption_metrics, "detail": detail_metrics}  # kinds scored against all references
HOW_MANY = "how many"
MAX_NEW_TOKENS = {"detail": 96}  # kinds that need more than DEFAULT_MAX_NEW_TOKENS
DEFAULT_MAX_NEW_TOKENS = 32
FIGURE = ("value", "low", "high", "count")


@dataclass(frozen=True)
class Item:
    """A question and its right answer."""

    conversation: Conversation  # the last message is the right answer
    kind: str
    references: tuple[str, ...]  # all human texts about the picture
    accepted: tuple[str, ...] = ()  # all right names, if there are several

    @property
    def question(self) -> tuple[Message, ...]:
        return self.conversation.messages[:-1]

    @property
    def answer(self) -> str:
        return self.conversation.messages[-1].text


def read_items(path: str | Path, limit: int | None = None) -> list[Item]:
    """Reads evaluation questions: LLaVA-Instruct entries with optional further fields.

    ``kind`` groups the questions, ``references`` lists all human texts about the picture, and ``accepted`` lists all
    right names. A conversation of several turns is scored on its last answer; the turns before are history.

    Raises:
        BadInput: the file is unreadable, or an entry ends without an answer.
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


def _item(entry: Any, label: str) -> Item:
    conversation = conversation_of(entry, label)
    if conversation.messages[-1].role != "assistant":
        raise BadInput(f"{label}: the conversation must end with the right answer.")
    references, accepted = (_texts(entry, field, label) for field in ("references", "accepted"))
    kind = entry.get("kind") or ("caption" if references else "answer")
    if not isinstance(kind, str):
        raise BadInput(f'{label}: "kind" must be a text.')
    return Item(conversation, kind, references or (conversation.messages[-1].text,), accepted)


def _texts(entry: dict, field: str, label: str) -> tuple[str, ...]:
    texts = entry.get(field)
    if texts is None:
        return ()
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadInput(f'{label}: "{field}" must be a list of texts.')
    return tuple(texts)


class ShuffledFeatures:
    """Replaces every picture by another one from the same questions."""

    def __init__(self, features: Features, names: Sequence[str]):
        self.features = features
        unique = list(dict.fromkeys(names))
        # The picture half a list away: neighbors may be similar, as in a series of photos.
        self.other = {
            name: unique[(index + max(len(unique) // 2, 1)) % len(unique)] for index, name in enumerate(unique)
        }

    def __contains__(self, name: str) -> bool:
        return name in self.other

    def shown(self, name: str) -> str:
        """The name of the picture that replaces this one."""
        return self.other[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.features[self.other[name]]


class BlankFeatures:
    """Replaces every picture by a uniform gray one."""

    def __init__(self, encoder: Any):
        self.blank = encoder.encode([Image.new("RGB", (256, 256), (128, 128, 128))])[0]

    def __contains__(self, name: str) -> bool:
        return True

    def shown(self, name: str) -> str:
        """The same name for every picture."""
        return BLANK

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.blank


class Evaluator:
    """Asks a model many questions in batches.

    Args:
        model, tokenizer, chat_format: as in training and chat.
        progress: wraps an iterator of batches, like tqdm; called with the iterator and a description.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
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
    def answers(
        self,
        items: Sequence[Item],
        features: Features,
        options: SamplingOptions,
        max_new_tokens: Mapping[str, int] = MappingProxyType({}),
    ) -> list[str]:
        """The model's answers, by greedy decoding or beam search, in the order of ``items``.

        Repeated prompts are answered once, and questions of a batch about the same picture share its prefill.

        Args:
            max_new_tokens: kind → limit; overrides the options' limit for these kinds.
        """
        limits = [max_new_tokens.get(item.kind, options.max_new_tokens) for item in items]
        result = [""] * len(items)
        for limit in dict.fromkeys(limits):
            chosen = [index for index, one in enumerate(limits) if one == limit]
            texts = self._answers([items[index] for index in chosen], features, replace(options, max_new_tokens=limit))
            for index, text in zip(chosen, texts, strict=True):
                result[index] = text
        return result

    def _answers(self, items: Sequence[Item], features: Features, options: SamplingOptions) -> list[str]:
        encoded = [self.tokenize(item, features) for item in items]
        keys = [_Key.of(prompt, features) for prompt in encoded]
        prompts = dict(zip(keys, encoded, strict=True))
        result = {}
        for batch in self.progress(self._batches_of_prompts(prompts), "answering"):
            embeddings = [self.embed(prompts[key], features) for key in batch]
            prefixes = [key.prefix for key in batch]
            shared = {"prefixes": prefixes, "prefix_length": len(prefixes[0][0])}
            shared = shared if prefixes[0][0] and len(set(prefixes)) < len(batch) else {}
            texts = generate_batch(self.model.language_model, self.tokenizer, embeddings, options, **shared)
            result.update(zip(batch, texts, strict=True))
        return [result[key] for key in keys]

    def _batches_of_prompts(self, prompts: Iterable[_Key]) -> list[list[_Key]]:
        """Batches with prefixes of equal length; within them, prompts with a common prefix are adjacent."""
        counts = Counter(key.prefix for key in prompts)
        lengths = sorted({len(key.prefix[0]) for key in prompts})
        batches = []
        for length in lengths:
            chosen = [key for key in prompts if len(key.prefix[0]) == length]
            chosen.sort(key=lambda key: (key.prefix if counts[key.prefix] > 1 else ((), ()), len(key.suffix)))
            batches += _batches(chosen, self.batch_size)
        return batches

    @torch.inference_mode()
    def perplexity(self, items: Sequence[Item], features: Features) -> Estimate:
        """The perplexity of the right answers, exp of the mean loss per token; 1 is certainty."""
        dataset = ConversationDataset(
            [item.conversation for item in items],
            features,
            self.tokenizer,
            self.chat_format,
            self.model.tokens_per_image,
            image_text=self._tags(features),
        )
        order = sorted(range(len(dataset)), key=lambda index: len(dataset.rows[index]))
        rows_per_batch = max(1, self.batch_size * len(dataset) // dataset.count)  # a row packs several conversations
        losses, counts = [], []
        for indices in self.progress(_batches(order, rows_per_batch), "perplexity"):
            batch = {
                name: tensor.to(self.model.device) for name, tensor in collate([dataset[i] for i in indices]).items()
            }
            logits, expected = self.model(**batch)
            loss = torch.nn.functional.cross_entropy(logits.float(), expected, reduction="none")  # [labels]
            per_conversation = [count for index in indices for count in _answer_lengths(dataset.rows[index])]
            losses += [part.sum().item() for part in loss.split(per_conversation)]
            counts += per_conversation
        loss, count = torch.tensor(losses, dtype=torch.float64).numpy(), torch.tensor(counts).numpy()
        return bootstrap(len(loss), lambda sample: exp(loss[sample].sum() / count[sample].sum()))

    def tokenize(self, item: Item, features: Features) -> TokenizedConversation:
        """Tokenizes an item's question up to the start of the answer."""
        return tokenize_conversation(
            item.question,
            self.tokenizer,
            self.chat_format,
            self.model.tokens_per_image,
            image_text=self._tags(features),
            add_generation_prompt=True,
        )

    def _tags(self, features: Features) -> Callable[[str], str]:
        """Picture name → its tag text, which follows the features that replace the picture."""
        return cache(lambda name: self.model.tags(features[name]))

    def embed(self, prompt: TokenizedConversation, features: Features) -> torch.Tensor:
        """The input embeddings of a prompt, [length, hidden_size]."""
        device = self.model.device
        found = [features[name].to(device).float() for name in prompt.images]
        token_ids = torch.tensor([prompt.token_ids], device=device)
        return self.model.splice(token_ids, torch.stack(found) if found else None)[0]


def measure(items: Sequence[Item], answers: Sequence[str]) -> dict[str, dict[str, Estimate]]:
    """Scores answers: kind of question → metric → estimate.

    If any answer of a kind hedges, its metrics include the share of hedged answers and the accuracy of the others.
    """
    result = {}
    for kind in dict.fromkeys(item.kind for item in items):
        chosen = [(item, answer) for item, answer in zip(items, answers, strict=True) if item.kind == kind]
        score = _score_of(kind, [item for item, _ in chosen])
        result[kind] = score(*zip(*chosen, strict=True))
        hedged = [is_hedged(answer) for _, answer in chosen]
        if any(hedged):
            result[kind]["hedged"] = share(hedged)
            plain = [pair for pair, has_hedge in zip(chosen, hedged, strict=True) if not has_hedge]
            if plain and "accuracy" in result[kind]:
                result[kind]["accuracy, not hedged"] = score(*zip(*plain, strict=True))["accuracy"]
    return result


def _score_of(kind: str, items: Sequence[Item]) -> Callable[[Sequence[Item], Sequence[str]], dict[str, Estimate]]:
    """The metric function of a kind; it takes items and their answers."""
    if kind in DESCRIPTIONS:
        return lambda items, said: DESCRIPTIONS[kind](said, [item.references for item in items])
    metrics = count_metrics if kind == HOW_MANY else metrics_for([item.answer for item in items])
    if metrics is answer_metrics and any(item.accepted for item in items):
        return lambda items, said: name_metrics(said, [(*item.accepted, item.answer) for item in items])
    return lambda items, said: metrics(said, [item.answer for item in items])


@dataclass(frozen=True)
class _Key:
    """The identity of a prompt: prompts with equal keys get equal answers."""

    prefix: tuple[tuple[int, ...], tuple[str, ...]]  # the tokens up to the end of the last picture, and the pictures
    suffix: tuple[int, ...]  # the tokens after it

    @classmethod
    def of(cls, prompt: TokenizedConversation, features: Features) -> _Key:
        token_ids = tuple(prompt.token_ids)
        end = max((index + 1 for index, token_id in enumerate(token_ids) if token_id == IMAGE_TOKEN_ID), default=0)
        shown = getattr(features, "shown", str)  # shuffled and blank features replace pictures
        return cls((token_ids[:end], tuple(map(shown, prompt.images))), token_ids[end:])


def _answer_lengths(row: PackedSequence) -> list[int]:
    """The number of answer tokens in each branch of the tree, so in each conversation."""
    counts = [0]
    for index, (parent, is_answer) in enumerate(zip(row.parent, row.is_answer, strict=True)):
        if parent != index - 1:
            counts.append(0)
        counts[-1] += is_answer
    return counts


def _batches(order: list, size: int) -> list[list]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def condition_features(
    condition: str, features: Features, items: Sequence[Item], encoder: Callable[[], Any]
) -> Features:
    """The features for a condition. ``encoder`` is called, and loads the encoder, only if needed."""
    if condition == SHUFFLED:
        return ShuffledFeatures(features, [name for item in items for name in item.conversation.images])
    return BlankFeatures(encoder()) if condition == BLANK else features


def flatten(results: dict[str, dict[str, Estimate]]) -> Iterator[tuple[str, str, Estimate]]:
    """Yields (kind, metric, estimate)."""
    for kind, metrics in results.items():
        for metric, estimate in metrics.items():
            yield kind, metric, estimate


def table(results: Sequence[dict]) -> tuple[list[tuple[str, str]], list[list[str]]]:
    """The estimates in evaluate.py's results as a table of text.

    Returns:
        The columns, as (weights, condition), and the rows: file, kind, metric, n, and one cell per column, "" if
        missing. If the columns have different numbers of questions, n lists all of them.
    """
    columns = list(dict.fromkeys((result["weights"], result["condition"]) for result in results))
    lines: dict[tuple[str, str, str], dict] = {}
    for result in results:
        for found in result["metrics"]:
            line = lines.setdefault((result["file"], found["kind"], found["metric"]), {})
            line[result["weights"], result["condition"]] = found
    rows = []
    for line, found in lines.items():
        figures = {column: Estimate(*(one[name] for name in FIGURE)) for column, one in found.items()}
        counts = " / ".join(dict.fromkeys(str(figure.count) for figure in figures.values()))
        rows.append([*line, counts, *(str(figures.get(column, "")) for column in columns)])
    return columns, rows


def markdown(results: Sequence[dict]) -> str:
    """``table`` as Markdown, for a model card."""
    columns, rows = table(results)
    headings = ["file", "kind", "metric", "n", *(f"{Path(weights).name}, {shown}" for weights, shown in columns)]
    cells = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in cells)
