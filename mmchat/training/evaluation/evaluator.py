"""Answers to a file of questions, measured; and again with other pictures, to see what language alone can guess."""

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
from ...inference.generation import generate_texts
from ...models.prompt import IMAGE_TOKEN_ID, ChatFormat, EncodedConversation, encode
from ...models.vision_language_model import MultimodalModel
from ..data.conversations import Conversation, conversation_of, stream_entries
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
DESCRIPTIONS = {"caption": caption_metrics, "detail": detail_metrics}  # kinds that are scored against all references
HOW_MANY = "how many"
MAX_NEW_TOKENS = {"detail": 96}  # the longest answer of a kind that needs more than DEFAULT_MAX_NEW_TOKENS
DEFAULT_MAX_NEW_TOKENS = 32
FIGURE = ("value", "low", "high", "count")


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

    def shown(self, name: str) -> str:
        """Which picture stands in its place."""
        return self.other[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.features[self.other[name]]


class BlankFeatures:
    """An even gray in place of every picture."""

    def __init__(self, encoder: Any):
        self.blank = encoder.encode([Image.new("RGB", (256, 256), (128, 128, 128))])[0]

    def __contains__(self, name: str) -> bool:
        return True

    def shown(self, name: str) -> str:
        """The same for every picture."""
        return BLANK

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
    def answers(
        self,
        items: Sequence[Item],
        features: Features,
        options: SamplingOptions,
        max_new_tokens: Mapping[str, int] = MappingProxyType({}),
    ) -> list[str]:
        """What the model answers, greedily or by beam search, in the order of ``items``.

        A prompt that occurs several times is answered once, and a picture that several questions of a batch are about
        is read once.

        Args:
            max_new_tokens: the longest answer to some kinds of questions, in place of that of the options.
        """
        longest = [max_new_tokens.get(item.kind, options.max_new_tokens) for item in items]
        result = [""] * len(items)
        for length in dict.fromkeys(longest):
            places = [place for place, one in enumerate(longest) if one == length]
            texts = self._answers([items[place] for place in places], features, replace(options, max_new_tokens=length))
            for place, text in zip(places, texts, strict=True):
                result[place] = text
        return result

    def _answers(self, items: Sequence[Item], features: Features, options: SamplingOptions) -> list[str]:
        encoded = [self._encode(item, features) for item in items]
        keys = [_Key.of(prompt, features) for prompt in encoded]
        prompts = dict(zip(keys, encoded, strict=True))
        result = {}
        for batch in self.progress(self._batches_of_prompts(prompts), "answering"):
            embeddings = [self._embed(prompts[key], features) for key in batch]
            prefixes = [key.prefix for key in batch]
            shared = {"prefixes": prefixes, "prefix_length": len(prefixes[0][0])}
            shared = shared if prefixes[0][0] and len(set(prefixes)) < len(batch) else {}
            texts = generate_texts(self.model.language_model, self.tokenizer, embeddings, options, **shared)
            result.update(zip(batch, texts, strict=True))
        return [result[key] for key in keys]

    def _batches_of_prompts(self, prompts: Iterable[_Key]) -> list[list[_Key]]:
        """Batches of equally long prefixes; in them pictures asked about more than once lie together, then lengths."""
        counts = Counter(key.prefix for key in prompts)
        lengths = sorted({len(key.prefix[0]) for key in prompts})
        batches = []
        for length in lengths:
            chosen = [key for key in prompts if len(key.prefix[0]) == length]
            chosen.sort(key=lambda key: (key.prefix if counts[key.prefix] > 1 else ((), ()), len(key.rest)))
            batches += _batches(chosen, self.batch_size)
        return batches

    @torch.inference_mode()
    def perplexity(self, items: Sequence[Item], features: Features) -> Estimate:
        """e to the mean loss of a token of the right answers; lower is better, 1 is certainty."""
        dataset = ConversationDataset(
            [item.conversation for item in items],
            features,
            self.tokenizer,
            self.chat_format,
            self.model.tokens_per_image,
            image_text=self._tags(features),
        )
        order = sorted(range(len(dataset)), key=lambda place: len(dataset.rows[place]))
        rows_per_batch = max(1, self.batch_size * len(dataset) // dataset.count)  # a row holds several conversations
        losses, counts = [], []
        for places in self.progress(_batches(order, rows_per_batch), "perplexity"):
            batch = {
                name: tensor.to(self.model.device) for name, tensor in collate([dataset[p] for p in places]).items()
            }
            logits, expected = self.model.label_logits(**batch)
            loss = torch.nn.functional.cross_entropy(logits.float(), expected, reduction="none")
            per_conversation = [count for place in places for count in _answer_lengths(dataset.rows[place])]
            losses += [part.sum().item() for part in loss.split(per_conversation)]
            counts += per_conversation
        loss, count = torch.tensor(losses, dtype=torch.float64).numpy(), torch.tensor(counts).numpy()
        return bootstrap(len(loss), lambda sample: exp(loss[sample].sum() / count[sample].sum()))

    def _encode(self, item: Item, features: Features) -> EncodedConversation:
        return encode(
            item.question,
            self.tokenizer,
            self.chat_format,
            self.model.tokens_per_image,
            image_text=self._tags(features),
            add_generation_prompt=True,
        )

    def _tags(self, features: Features) -> Callable[[str], str]:
        """What is said about a picture: the tags of what is shown in its place."""
        return cache(lambda name: self.model.tags(features[name]))

    def _embed(self, prompt: EncodedConversation, features: Features) -> torch.Tensor:
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
    metrics = count_metrics if kind == HOW_MANY else metrics_for([item.answer for item in items])
    if metrics is answer_metrics and any(item.accepted for item in items):
        return lambda items, said: name_metrics(said, [(*item.accepted, item.answer) for item in items])
    return lambda items, said: metrics(said, [item.answer for item in items])


@dataclass(frozen=True)
class _Key:
    """A prompt as the model reads it; equal ones get equal answers."""

    prefix: tuple[tuple[int, ...], tuple[str, ...]]  # its tokens up to the end of the last picture, and the pictures
    rest: tuple[int, ...]  # tokens after that

    @classmethod
    def of(cls, prompt: EncodedConversation, features: Features) -> _Key:
        token_ids = tuple(prompt.token_ids)
        end = max((place + 1 for place, token_id in enumerate(token_ids) if token_id == IMAGE_TOKEN_ID), default=0)
        shown = getattr(features, "shown", str)  # some features are those of another picture
        return cls((token_ids[:end], tuple(map(shown, prompt.images))), token_ids[end:])


def _answer_lengths(row: PackedSequence) -> list[int]:
    """How many tokens of answers each conversation of a row has; one begins wherever a branch of the tree does."""
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
    """The features that are shown under a condition; the encoder is loaded only where it is needed."""
    if condition == SHUFFLED:
        return ShuffledFeatures(features, [name for item in items for name in item.conversation.images])
    return BlankFeatures(encoder()) if condition == BLANK else features


def flatten(results: dict[str, dict[str, Estimate]]) -> Iterator[tuple[str, str, Estimate]]:
    """(kind, metric, figure), one after the other."""
    for kind, metrics in results.items():
        for metric, estimate in metrics.items():
            yield kind, metric, estimate


def table(results: Sequence[dict]) -> tuple[list[tuple[str, str]], list[list[str]]]:
    """The figures of evaluate.py's results as text.

    Returns:
        (weights, condition) of each column, and rows: file, kind, metric, n, then a figure for each column, "" where
        there is none. Where columns rest on different numbers of questions, n names them all.
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
    """``table`` for a model card."""
    columns, rows = table(results)
    headings = ["file", "kind", "metric", "n", *(f"{Path(weights).name}, {shown}" for weights, shown in columns)]
    cells = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in cells)
