"""Self-critical sequence training, SCST: the model samples answers and learns from their rewards.

Cross-entropy favors safe, generic captions. SCST (Rennie et al. 2017, arXiv 1612.00563) rewards sampled captions by
their similarity to human ones. The baseline is the mean reward of the picture's other samples (Luo 2020, arXiv
2003.09971). Photos with a label but no caption are used, too: a description of them should name the thing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..errors import BadInput
from ..inference.generation import stop_token_ids
from ..models.prompt import IMAGE_TOKEN_ID, TokenizedConversation
from ..models.vision_language_model import IGNORE_INDEX, VisionLanguageModel
from .data.packing import ConversationDataset, PackedSequence, collate, lay_out
from .data.questions import PEOPLE, PEOPLE_WORDS
from .evaluation.metrics import words
from .trainer import VisionLanguageTrainer

# Added to the reward of a text with people that no reference mentions: most training captions have some.
INVENTED_PEOPLE = -0.5
MIN_LIMIT = 24  # tokens; a sample may be at least this long, even if its references are single words
MIN_ANSWERS = 3  # a question with at least this many different answers is open
_PEOPLE = {*PEOPLE, *PEOPLE.values(), *PEOPLE_WORDS}


@dataclass(frozen=True)
class OpenQuestion:
    """A question about a picture, and its human answers."""

    token_ids: list[int]  # the prompt, up to the answer
    answers: list[list[int]]  # token ids, without stop tokens
    images: list[str]


def take_open_questions(row: PackedSequence, stop_ids: set[int]) -> tuple[PackedSequence, list[OpenQuestion]]:
    """Takes the open questions out of a sequence, so that cross-entropy does not train on their answers.

    An answer that is followed by another question stays in the sequence as context.

    Returns:
        A copy of the sequence without these answers, and the questions.
    """
    answer_starts: dict[int, list[int]] = defaultdict(list)  # index of a question's last token → of first answer tokens
    for index, parent in enumerate(row.parent):
        if row.is_answer[index] and parent >= 0 and not row.is_answer[parent]:
            answer_starts[parent].append(index)
    questions, removed, is_answer = [], set(), list(row.is_answer)
    for last, starts in answer_starts.items():
        path = _path_to(row, last)
        shows_all = sum(row.token_ids[index] == IMAGE_TOKEN_ID for index in path) == row.token_ids.count(IMAGE_TOKEN_ID)
        spans = [_answer_span(row, start) for start in starts]
        answers = [[row.token_ids[index] for index in span if row.token_ids[index] not in stop_ids] for span in spans]
        if shows_all and len({tuple(answer) for answer in answers}) >= MIN_ANSWERS:
            questions.append(OpenQuestion([row.token_ids[index] for index in path], answers, row.images))
            for span in spans:
                for index in span:
                    is_answer[index] = False
                branch = range(span.start, row.subtree_end[span.start])
                removed.update(branch if not any(is_answer[index] for index in branch) else ())
    return replace(row, is_answer=is_answer).without(removed), questions


def _path_to(row: PackedSequence, index: int) -> list[int]:
    """The indices of a token and of all its ancestors, the root first."""
    path = []
    while index >= 0:
        path.append(index)
        index = row.parent[index]
    return path[::-1]


def _answer_span(row: PackedSequence, start: int) -> range:
    end = start + 1
    while end < len(row) and row.is_answer[end] and row.parent[end] == end - 1:
        end += 1
    return range(start, end)


class Reward:
    """CIDEr-D (Vedantam et al. 2015) plus BLEU-4 of a text against its references, less a penalty for invented people.

    CIDEr's document frequencies come from all pictures. A period counts as a word; otherwise truncated texts
    ("… and a") would score well. References without a period are names of a thing: a text that contains one of them
    earns 1 instead of CIDEr and BLEU-4.

    Args:
        references: the human texts about each picture of the training set.
    """

    def __init__(self, references: Sequence[Sequence[str]]):
        from pycocoevalcap.cider.cider_scorer import CiderScorer

        self._all = CiderScorer(n=4, sigma=6.0)
        for texts in references:
            if _are_names(texts):
                continue
            self._all += (None, [_with_period(text) for text in texts])
        self._all.compute_doc_freq()

    def __call__(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> torch.Tensor:
        """The reward of each text against its own references, about 0 to 10: [texts]."""
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider_scorer import CiderScorer

        cider, bleu = CiderScorer(n=4, sigma=6.0), BleuScorer(n=4)
        for text, wanted in zip(texts, references, strict=True):
            pair = (_with_period(text), [_with_period(reference) for reference in wanted])
            cider += pair
            bleu += pair
        cider.document_frequency = self._all.document_frequency
        cider.crefs = cider.crefs + self._all.crefs  # only their number is used, as the number of documents
        _, bleu_scores = bleu.compute_score(option="closest", verbose=0)
        similar = torch.tensor(cider.compute_cider()) + torch.tensor(bleu_scores[3])  # [texts]
        for index, (text, wanted) in enumerate(zip(texts, references, strict=True)):
            if _are_names(wanted):
                similar[index] = float(any(f" {words(name)} " in f" {words(text)} " for name in wanted))
            if _mentions_people([text]) and not _mentions_people(wanted):
                similar[index] += INVENTED_PEOPLE
        return similar


def _are_names(references: Sequence[str]) -> bool:
    return not any(text.rstrip().endswith(".") for text in references)


def _mentions_people(texts: Sequence[str]) -> bool:
    return not _PEOPLE.isdisjoint(word for text in texts for word in words(text).split())


def _with_period(text: str) -> str:
    return words(text) + (" ." if text.rstrip().endswith(".") else "")


def advantages(rewards: torch.Tensor) -> torch.Tensor:
    """The reward of each sample minus the mean reward of the question's other samples: [questions, samples]."""
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


@torch.no_grad()
def sample_answers(
    model: VisionLanguageModel, questions: Sequence[OpenQuestion], features: torch.Tensor, count: int
) -> list[list[list[int]]]:
    """Samples ``count`` answers to each question at temperature 1, each with its stop token.

    A question is prefilled once for all its samples.

    Args:
        features: [images, features, image_dim] of the pictures in the questions.

    Returns:
        Token ids for each question and sample.
    """
    longest = max(len(question.token_ids) for question in questions)
    token_ids = torch.zeros(len(questions), longest, dtype=torch.long, device=model.device)  # [questions, longest]
    is_token = torch.zeros_like(token_ids)
    for index, question in enumerate(questions):  # left padding aligns the ends of the prompts
        token_ids[index, longest - len(question.token_ids) :] = torch.tensor(question.token_ids)
        is_token[index, longest - len(question.token_ids) :] = 1
    max_new_tokens = max(MIN_LIMIT, 1 + max(len(answer) for question in questions for answer in question.answers))
    is_training = model.training
    model.eval()  # in training mode, gradient checkpointing turns the KV cache off
    with torch.compiler.set_stance("force_eager"):  # each step has a new length and would recompile
        sampled = _sample(model, model.splice(token_ids, features), is_token, count, max_new_tokens)
    model.train(is_training)
    stop_ids = stop_token_ids(model.unwrapped_language_model)
    answers = [_up_to_stop(row, stop_ids) for row in sampled.tolist()]
    return [answers[start : start + count] for start in range(0, len(answers), count)]


def _sample(
    model: VisionLanguageModel, embeddings: torch.Tensor, is_token: torch.Tensor, count: int, max_new_tokens: int
) -> torch.Tensor:
    """Samples until every sequence has a stop token: [questions × count, tokens]."""
    from transformers import DynamicCache

    language_model = model.unwrapped_language_model
    stop_ids = torch.tensor(sorted(stop_token_ids(language_model)), device=embeddings.device)
    cache = DynamicCache(config=language_model.config)
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    position = (is_token.cumsum(dim=1) - 1).clamp(min=0)  # [questions, longest]
    logits = language_model(inputs_embeds=embeddings, attention_mask=is_token, position_ids=position, **options).logits[
        :, -1
    ]  # [questions, vocabulary]
    cache.batch_repeat_interleave(count)
    logits, is_token, position = (part.repeat_interleave(count, dim=0) for part in (logits, is_token, position[:, -1:]))
    sampled = []
    is_finished = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for _ in range(max_new_tokens):
        token = _draw(logits)  # [questions × count, 1]
        sampled.append(token)
        is_finished |= torch.isin(token[:, 0], stop_ids)
        if is_finished.all():
            break
        is_token, position = nn.functional.pad(is_token, (0, 1), value=1), position + 1
        logits = language_model(input_ids=token, attention_mask=is_token, position_ids=position, **options).logits[
            :, -1
        ]
    return torch.cat(sampled, dim=1)


def _draw(logits: torch.Tensor) -> torch.Tensor:
    """Samples a token per row from the softmax: [rows, vocabulary] → [rows, 1].

    Many times faster on a CPU than ``torch.multinomial``, which draws a random number for each vocabulary entry.
    """
    cumulative = logits.float().softmax(dim=-1).cumsum(dim=-1)  # [rows, vocabulary]
    return torch.searchsorted(cumulative, torch.rand_like(cumulative[:, :1]) * cumulative[:, -1:])


def _up_to_stop(token_ids: list[int], stop_ids: set[int]) -> list[int]:
    """The tokens up to and including the first stop token, which counts in the loss like any other."""
    end = next((index + 1 for index, token_id in enumerate(token_ids) if token_id in stop_ids), len(token_ids))
    return token_ids[:end]


class SelfCriticalTrainer(VisionLanguageTrainer):
    """Trains open questions with SCST and all other answers with cross-entropy.

    Args:
        tokenizer: decodes the samples.

    Raises:
        BadInput: the training set has no open question.
    """

    def __init__(
        self, *, tokenizer: Any, model: VisionLanguageModel, train_dataset: ConversationDataset, **options: Any
    ):
        stop_ids = stop_token_ids(model.unwrapped_language_model)
        rows, found = [], []
        for row in train_dataset.rows:
            remaining, questions = take_open_questions(row, stop_ids)
            rows.append(replace(remaining, open_questions=questions))
            found += questions
        if not found:
            raise BadInput(
                f"No question has {MIN_ANSWERS} different answers, so SCST has nothing to compare its samples with: "
                "add such questions or set scst_samples to 0."
            )
        super().__init__(model=model, train_dataset=train_dataset.with_rows(rows), **options)
        self.tokenizer = tokenizer
        self.data_collator = _collate_with_rows
        self._reward = Reward([self._texts(question.answers) for question in found])
        self._rewards: list[float] = []

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        rows = inputs.pop("rows")
        loss = super().compute_loss(model, inputs, *arguments, **options)
        questions = [question for row in rows for question in row.open_questions]
        if not model.training or not questions:
            return loss
        batch = self._rewarded_batch(questions)
        count = int((batch["labels"] != IGNORE_INDEX).sum()) * self.args.gradient_accumulation_steps
        rewarded, _ = self._loss_and_outputs(model, batch, count)
        return loss + rewarded

    def _rewarded_batch(self, questions: list[OpenQuestion]) -> dict[str, torch.Tensor]:
        """A batch of sampled answers, each weighted by its advantage."""
        features = [
            torch.stack([self.train_dataset.features[name] for name in question.images]) for question in questions
        ]
        model = self.accelerator.unwrap_model(self.model)
        shown = torch.cat(features).float().to(model.device)  # [images, features, image_dim]
        sampled = sample_answers(model, questions, shown, self.recipe.scst_samples)
        references = [self._texts(question.answers) for question in questions for _ in range(self.recipe.scst_samples)]
        texts = self._texts([answer for answers in sampled for answer in answers])
        rewards = self._reward(texts, references).view(len(questions), -1)  # [questions, samples]
        self._rewards.append(rewards.mean().item())
        examples = []
        for question, picture, answers, weights in zip(
            questions, features, sampled, advantages(rewards).tolist(), strict=True
        ):
            conversations = [_answered(question, answer) for answer in answers]
            length = sum(len(conversation.token_ids) for conversation in conversations)
            examples += [{"row": row, "features": picture} for row in lay_out(conversations, length, weights)]
        return {name: tensor.to(model.device) for name, tensor in collate(examples).items()}

    def _texts(self, answers: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(answers, skip_special_tokens=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._rewards and "loss" in logs:
            logs["reward"] = round(sum(self._rewards) / len(self._rewards), 4)
            self._rewards = []
        super().log(logs, start_time)


def _answered(question: OpenQuestion, answer: list[int]) -> TokenizedConversation:
    is_answer = [False] * len(question.token_ids) + [True] * len(answer)
    return TokenizedConversation(question.token_ids + answer, is_answer, question.images)


def _collate_with_rows(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {**collate(examples), "rows": [example["row"] for example in examples]}
