"""Sampling: the next token from the logits, in a few vectorized operations.

They run in NumPy, on one thread: PyTorch would share this millisecond of work among threads that then busy-wait for
more and take a core from the decoder while it computes the next token.
"""

from __future__ import annotations

import hashlib
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
            token_id = self._draw(*self.distribution(logits))
        if self._ngram_size:
            self._followers[self._ngram_start()].append(token_id)
        self._written.append(token_id)
        return token_id

    def _draw(self, token_ids: np.ndarray, probabilities: np.ndarray) -> int:
        """Samples a token with the Gumbel-max trick, as ``torch.multinomial`` does, but with noise per token id.

        Rounding swaps the ranks of nearly equal tokens and moves the end of the nucleus. With noise per rank, or noise
        that is drawn one after the other, either would change the rest of the answer that a seed gives.
        """
        if len(token_ids) == 1:
            return int(token_ids[0])
        key = hashlib.blake2b(f"{self._seed} {len(self._written)}".encode(), digest_size=8).digest()
        noise = -np.log(_uniform(int.from_bytes(key, "little"), token_ids))  # [tokens], exponentially distributed
        return int(token_ids[(probabilities / noise).argmax()])

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
            token_ids, scores = np.array(self._written), scores.copy()
            written = scores[token_ids]  # [written tokens]
            scores[token_ids] = np.where(written < 0, written * self._penalty, written / self._penalty)
        if self._ngram_size and (repeating := self._followers.get(self._ngram_start())):
            scores = scores.copy()
            scores[repeating] = -np.inf
        return scores

    def _ngram_start(self) -> tuple[int, ...]:
        """The last tokens, which the next one would complete to an n-gram; fewer at the start of the answer."""
        return tuple(self._written[max(len(self._written) - self._ngram_size + 1, 0) :])


def _uniform(key: int, token_ids: np.ndarray) -> np.ndarray:
    """A random number in (0, 1) for each token id, which depends on the key and that id alone: [tokens].

    SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195). NumPy's generators would have to draw a number
    for every token of the vocabulary.
    """
    bits = np.uint64(key) + token_ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # modulo 2**64
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return ((bits >> np.uint64(12)) + 0.5) / 2.0**52
