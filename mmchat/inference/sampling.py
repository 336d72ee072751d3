"""Sampling: the next token from the logits, in a few vectorized operations."""

from __future__ import annotations

import torch

from ..conversation import SamplingOptions


class Sampler:
    """Chooses the tokens of one answer; remembers them for the repetition penalty.

    The order is that of transformers' logits processors: repetition penalty, temperature, top-p.

    Args:
        options: ``beams`` and ``max_new_tokens`` are ignored; a repetition penalty of None is none.
        device: where the logits are.
    """

    def __init__(self, options: SamplingOptions, device: torch.device | str = "cpu"):
        self._penalty = options.repetition_penalty or 1.0
        self._temperature, self._top_p = options.temperature, options.top_p
        self._generator = torch.Generator(device)
        self._generator.manual_seed(options.seed) if options.seed is not None else self._generator.seed()
        self._written: dict[int, None] = {}  # distinct tokens of the answer

    def __call__(self, logits: torch.Tensor) -> int:
        """The id of the next token, from logits, [vocabulary]."""
        if self._temperature == 0:
            token_id = int(self._penalized(logits).argmax())
        else:
            token_id = self._draw(*self.distribution(logits), len(logits))
        self._written[token_id] = None
        return token_id

    def _draw(self, token_ids: torch.Tensor, probabilities: torch.Tensor, vocabulary: int) -> int:
        """Samples a token with the Gumbel-max trick, as ``torch.multinomial`` does, but with noise per token id.

        Rounding swaps the ranks of nearly equal tokens and moves the end of the nucleus. With noise per rank, either
        would change the answer that a seed gives.
        """
        noise = torch.rand(vocabulary, generator=self._generator, device=probabilities.device)  # [vocabulary]
        return int(token_ids[(probabilities / -noise[token_ids].log()).argmax()])

    def distribution(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that may be next and their probabilities, [candidates] each, from logits, [vocabulary].

        Of a vocabulary of V tokens, those less likely than (1 - top_p) / V have less than 1 - top_p together, so none
        of them is in the nucleus, and only the few others are sorted.
        """
        probabilities = (self._penalized(logits) / self._temperature).softmax(dim=-1)  # [vocabulary]
        if self._top_p == 1:
            return torch.arange(len(probabilities), device=probabilities.device), probabilities
        token_ids = (probabilities >= (1 - self._top_p) / len(probabilities)).nonzero()[:, 0]  # [candidates]
        likeliest, order = probabilities[token_ids].sort(descending=True, stable=True)
        before = likeliest.cumsum(dim=0) - likeliest  # [candidates], the probability of all more likely tokens
        count = max(int((before < self._top_p).sum()), 1)
        return token_ids[order[:count]], likeliest[:count] / likeliest[:count].sum()

    def _penalized(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits with those of tokens already in the answer lowered (Keskar et al. 2019, arXiv 1909.05858)."""
        logits = logits.float()
        if self._penalty == 1 or not self._written:
            return logits
        written = torch.tensor(list(self._written), device=logits.device)
        values = logits[written]
        lowered = torch.where(values < 0, values * self._penalty, values / self._penalty)
        return logits.index_copy(0, written, lowered)
