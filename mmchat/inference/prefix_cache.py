"""Prefix cache: keys and values kept between turns, so a follow-up question prefills only its new tokens.

A conversation is always prefilled up to the same boundaries: the end of the prefix that all conversations share, the
end of each image, the start of each answer, and the end of the prompt. A cached prefix ends at one of them, so its keys
and values are bitwise equal to recomputed ones, and the cache never changes an answer. The keys and values of a
generated answer are not kept: the next turn prefills it along with the next question.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from ..models.prompt import TokenizedConversation
from .decoder import Cache, Decoder

MIN_SHARED = 8  # tokens that all conversations share; fewer are not worth a prefill of their own

TokenKeys = list[Hashable]  # a token's id, or (digest of an image, index of its token)


@dataclass
class CachedPrefix:
    """The beginning of a conversation, with its KV cache."""

    cache: Cache
    tokens: TokenKeys = field(default_factory=list)
    logits: torch.Tensor | None = None  # of the last token, [1, vocabulary]; None if not kept


class PrefixCache:
    """The prefixes of the most recent conversations, as many as fit.

    Args:
        decoder: makes the KV caches.
        budget_bytes: limit on the size of all of them together.
    """

    def __init__(self, decoder: Decoder, budget_bytes: float):
        self.decoder, self.budget_bytes = decoder, budget_bytes
        self._prefixes: list[CachedPrefix] = []  # most recent last

    def __len__(self) -> int:
        return len(self._prefixes)

    @property
    def size(self) -> int:
        """Bytes of all KV caches."""
        return sum(prefix.cache.size for prefix in self._prefixes)

    def lookup(self, tokens: TokenKeys, ends: Sequence[int], with_adapter: bool) -> CachedPrefix:
        """The longest cached prefix of a conversation; an empty one if there is none.

        An exact match is returned as is: its logits are cached, so nothing is prefilled. If the conversation extends a
        cached prefix, that entry is removed and returned for reuse. If they diverge, the common part is copied.

        Args:
            ends: the boundaries up to which the conversation is prefilled; the last one is its length.
        """
        candidates = [prefix for prefix in self._prefixes if prefix.cache.with_adapter == with_adapter]
        for prefix in candidates:
            if prefix.logits is not None and prefix.tokens == tokens:
                return prefix
        best = max(candidates, key=lambda prefix: common_length(prefix.tokens, tokens), default=None)
        common = common_length(best.tokens, tokens) if best else 0
        length = max((end for end in ends[:-1] if end <= common), default=0)
        if not best or not length:
            return CachedPrefix(self.decoder.new_cache(with_adapter))
        if length < len(best.tokens):
            return CachedPrefix(best.cache.prefix(length), tokens[:length])
        self._prefixes.remove(best)
        return best

    def covers(self, tokens: TokenKeys, with_adapter: bool) -> bool:
        """Whether a cached prefix begins with these tokens, so that prefilling them would gain nothing."""
        return any(
            prefix.cache.with_adapter == with_adapter and prefix.tokens[: len(tokens)] == tokens
            for prefix in self._prefixes
        )

    def keep(self, prefix: CachedPrefix) -> None:
        """Adds a prefix as the most recent one and evicts the oldest ones that no longer fit."""
        self._prefixes = [*(other for other in self._prefixes if other is not prefix), prefix]
        while len(self._prefixes) > 1 and self.size > self.budget_bytes:
            self._prefixes.pop(0)
        if prefix.cache.size > self.budget_bytes:
            self.clear()

    def clear(self) -> None:
        """Removes every entry."""
        self._prefixes.clear()


def prefill_boundaries(encoded: TokenizedConversation, shared: Sequence[int]) -> list[int]:
    """Prefill boundaries: the ends of the common prefix, of images and of the prompt, the start of each answer."""
    before = zip(encoded.is_answer, encoded.is_answer[1:], strict=False)
    starts = [index for index, (one, next_one) in enumerate(before, start=1) if next_one and not one]
    has_shared = len(shared) >= MIN_SHARED and encoded.token_ids[: len(shared)] == shared
    ends = {*([len(shared)] if has_shared else []), *encoded.image_ends, *starts, len(encoded.token_ids)}
    return sorted(ends)


def common_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the common prefix of two sequences."""
    return next(
        (index for index, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )
