"""Prefix cache: keys and values kept between turns, so a follow-up question prefills only its new tokens.

A conversation is always prefilled in the same pieces, each up to where an answer begins. What is kept is therefore what
would be computed anew, to the bit; it makes no difference to an answer whether the conversation is remembered. Answers
are prefilled as part of the next piece.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from .decoder import Cache, Decoder

TokenKeys = list[Hashable]  # a token's id, or (digest of a picture, index of its token)


@dataclass
class CachedPrefix:
    """The beginning of a conversation, and the keys and values that a decoder computed for it."""

    with_adapter: bool  # the adapter changes what is computed, so on and off do not mix
    cache: Cache
    tokens: TokenKeys = field(default_factory=list)

    def crop(self, tokens: TokenKeys) -> None:
        """Forgets what comes after these tokens, with which it begins."""
        self.cache.crop(len(tokens))
        self.tokens = tokens


class PrefixCache:
    """The prefixes of the latest conversations, as many as fit.

    Args:
        decoder: makes the caches.
        budget: bytes that all of them together may take.
    """

    def __init__(self, decoder: Decoder, budget: float):
        self.decoder, self.budget = decoder, budget
        self._kept: list[CachedPrefix] = []  # the latest last

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def size(self) -> int:
        """Bytes of all keys and values."""
        return sum(prefix.cache.size for prefix in self._kept)

    def take(self, tokens: TokenKeys, ends: Sequence[int], with_adapter: bool) -> CachedPrefix:
        """The longest prefix of a conversation; an empty one if no conversation began like it.

        The last piece is always left to prefill, since its logits are wanted. A conversation that goes on takes its
        prefix along; one that only begins like another leaves that one its own.

        Args:
            ends: where the pieces end in which the conversation is prefilled; the last is its own end.
        """
        alike = [prefix for prefix in self._kept if prefix.with_adapter == with_adapter]
        best = max(alike, key=lambda prefix: _common(prefix.tokens, tokens), default=None)
        common = _common(best.tokens, tokens) if best else 0
        length = max((end for end in ends[:-1] if end <= common), default=0)
        if not length:
            return CachedPrefix(with_adapter, self.decoder.new_cache(with_adapter))
        if length < len(best.tokens) // 2:
            return CachedPrefix(with_adapter, best.cache.prefix(length), tokens[:length])
        self._kept.remove(best)
        best.crop(tokens[:length])
        return best

    def keep(self, prefix: CachedPrefix) -> None:
        """Puts a prefix back, and drops the oldest that do not fit."""
        self._kept.append(prefix)
        while len(self._kept) > 1 and self.size > self.budget:
            self._kept.pop(0)
        if prefix.cache.size > self.budget:
            self.clear()

    def clear(self) -> None:
        """Forgets every conversation."""
        self._kept.clear()


def _common(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """How many items two sequences have in common at their beginning."""
    return next(
        (index for index, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )
