"""Sampling: the next token from the logits, in a few vectorized operations.

They run in NumPy, on one thread: PyTorch would share this millisecond of work among threads that then wait actively for
more, and take a core from ONNX Runtime while it computes the next token.
"""

from __future__ import annotations

import numpy as np
import torch

from ..conversation import SamplingOptions


class Sampler:
    """Chooses the tokens of one answer; remembers them for the repetition penalty.

    The order is that of transformers' logits processors: repetition penalty, temperature, top-p.

    Args:
        options: ``beams`` and ``max_new_tokens`` are ignored; a repetition penalty of None is none.
    """

    def __init__(self, options: SamplingOptions):
        self._penalty = options.repetition_penalty or 1.0
        self._temperature, self._top_p = options.temperature, options.top_p
        self._random = np.random.default_rng(options.seed)
        self._written: dict[int, None] = {}  # distinct tokens of the answer

    def __call__(self, logits: torch.Tensor) -> int:
        """The id of the next token, from logits, [vocabulary]."""
        if self._temperature == 0:
            token_id = int(self._penalized(logits).argmax())
        else:
            token_id = self._draw(*self.distribution(logits), len(logits))
        self._written[token_id] = None
        return token_id

    def _draw(self, token_ids: np.ndarray, probabilities: np.ndarray, vocabulary: int) -> int:
        """Samples a token with the Gumbel-max trick, as ``torch.multinomial`` does, but with noise per token id.

        Rounding swaps the ranks of nearly equal tokens and moves the end of the nucleus. With noise per rank, either
        would change the answer that a seed gives.
        """
        noise = self._random.standard_exponential(vocabulary, dtype=np.float32)  # [vocabulary]
        return int(token_ids[(probabilities / noise[token_ids]).argmax()])

    def distribution(self, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that may be next and their probabilities, [candidates] each, from logits, [vocabulary].

        Of a vocabulary of V tokens, those less likely than (1 - top_p) / V have less than 1 - top_p together, so none
        of them is in the nucleus, and only the few others are sorted.
        """
        scores = self._penalized(logits) / np.float32(self._temperature)
        probabilities = np.exp(scores - scores.max())
        probabilities /= probabilities.sum()  # [vocabulary]
        if self._top_p == 1:
            return np.arange(len(probabilities)), probabilities
        token_ids = np.flatnonzero(probabilities >= (1 - self._top_p) / len(probabilities))  # [candidates]
        order = np.argsort(-probabilities[token_ids], kind="stable")
        likeliest = probabilities[token_ids[order]]
        before = likeliest.cumsum() - likeliest  # [candidates], the probability of all more likely tokens
        count = max(int((before < self._top_p).sum()), 1)
        return token_ids[order[:count]], likeliest[:count] / likeliest[:count].sum()

    def _penalized(self, logits: torch.Tensor) -> np.ndarray:
        """Logits with those of tokens already in the answer lowered (Keskar et al. 2019, arXiv 1909.05858)."""
        values = logits.float().cpu().numpy()
        if self._penalty == 1 or not self._written:
            return values
        written = np.fromiter(self._written, dtype=np.int64)
        values = values.copy()
        values[written] = np.where(
            values[written] < 0, values[written] * self._penalty, values[written] / self._penalty
        )
        return values
