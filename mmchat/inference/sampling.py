"""Sampling: the next token from the logits, in a few vectorized operations.

They run in NumPy, on one thread: PyTorch would share this millisecond of work among threads that then busy-wait for
more and take a core from the decoder while it computes the next token.
"""

from __future__ import annotations

import secrets
from collections import defaultdict

import numpy as np
import torch

from ..conversation import SamplingOptions

NEGLIGIBLE = 25.0  # tokens whose scaled logit is this far below the largest have less than 1e-6 together
UNDERFLOW = 104.0  # the exponential of less is 0 in fp32


class Sampler:
    """Chooses the tokens of one answer; remembers them, so that they repeat less.

    The order is that of transformers' logits processors: repetition penalty, n-grams, temperature, top-p.

    Args:
        options: ``beams`` and ``max_new_tokens`` are ignored; a repetition penalty or n-gram size of None is none.
    """

    def __init__(self, options: SamplingOptions):
        self._penalty = options.repetition_penalty or 1.0
        self._temperature, self._top_p = options.temperature, options.top_p
        # NumPy takes no negative seed.
        self._seed = secrets.randbits(64) if options.seed is None else options.seed % 2**64
        self._ngram_size = options.no_repeat_ngram_size or 0
        self._written: list[int] = []  # tokens of the answer
        self._followers: dict[tuple[int, ...], list[int]] = defaultdict(list)  # what came after the start of an n-gram

    def __call__(self, logits: torch.Tensor) -> int:
        """The id of the next token, from logits, [vocabulary]."""
        if self._temperature == 0:
            token_id = int(self.scores(logits).argmax())
        else:
            token_id = self._draw(*self.distribution(logits), len(logits))
        if self._ngram_size:
            self._followers[self._ngram_start()].append(token_id)
        self._written.append(token_id)
        return token_id

    def _draw(self, token_ids: np.ndarray, probabilities: np.ndarray, vocabulary: int) -> int:
        """Samples a token with the Gumbel-max trick, as ``torch.multinomial`` does, but with noise per token id.

        Rounding swaps the ranks of nearly equal tokens and moves the end of the nucleus. With noise per rank, or noise
        that is drawn one after the other, either would change the rest of the answer that a seed gives.
        """
        if len(token_ids) == 1:
            return int(token_ids[0])
        random = np.random.default_rng((self._seed, len(self._written)))
        noise = random.standard_exponential(vocabulary, dtype=np.float32)  # [vocabulary]
        return int(token_ids[(probabilities / noise[token_ids]).argmax()])

    def distribution(self, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that may be next and their probabilities, [candidates] each, from logits, [vocabulary].

        Of a vocabulary of V tokens, those less likely than (1 - top_p) / V have less than 1 - top_p together, so none
        of them is in the nucleus, and only the few others are sorted.
        """
        scores = self.scores(logits)
        largest = scores.max()
        reach = self._temperature * (UNDERFLOW if self._top_p == 1 else NEGLIGIBLE)
        token_ids = np.flatnonzero(scores > largest - np.float32(reach))  # [likely]
        probabilities = np.exp((scores[token_ids] - largest) / np.float32(self._temperature))  # [likely]
        probabilities /= probabilities.sum()
        if self._top_p == 1:
            return token_ids, probabilities
        is_candidate = probabilities >= (1 - self._top_p) / len(scores)
        token_ids, probabilities = token_ids[is_candidate], probabilities[is_candidate]  # [candidates]
        order = np.argsort(-probabilities, kind="stable")
        likeliest = probabilities[order]
        before = likeliest.cumsum() - likeliest  # [candidates], the probability of all more likely tokens
        count = max(int((before < self._top_p).sum()), 1)
        return token_ids[order[:count]], likeliest[:count] / likeliest[:count].sum()

    def scores(self, logits: torch.Tensor) -> np.ndarray:
        """Logits, [vocabulary]: lower for tokens that are in the answer, -inf for those that would repeat an n-gram."""
        scores = logits.float().cpu().numpy()
        if self._penalty != 1 and self._written:
            scores, written = scores.copy(), scores[self._written]
            scores[self._written] = np.where(written < 0, written * self._penalty, written / self._penalty)
        if self._ngram_size and (repeating := self._followers.get(self._ngram_start())):
            scores = scores.copy()
            scores[repeating] = -np.inf
        return scores

    def _ngram_start(self) -> tuple[int, ...]:
        """The last tokens, which the next one would complete to an n-gram; fewer at the start of the answer."""
        return tuple(self._written[max(len(self._written) - self._ngram_size + 1, 0) :])
