"""What the model has read already: kept between turns, so that a follow-up question reads only what is new.

A conversation is always read in the same pieces, each up to where an answer begins. What is kept is therefore what
would be computed anew, to the bit; it makes no difference to an answer whether the conversation is remembered. The
answers themselves are read as part of the next piece.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = list[Hashable]  # a token's id, or (digest of a picture, number of its token)


@dataclass
class Reading:
    """A row of tokens that the model has read, and the keys and values it computed for them."""

    with_adapter: bool  # the adapter changes what is computed, so on and off do not mix
    cache: Any  # of a decoder
    row: Row = field(default_factory=list)

    def shorten(self, row: Row) -> None:
        """Forgets what comes after a row."""
        self.cache.crop(len(row))
        self.row = row


class Readings:
    """The latest conversations' readings, as many as have room.

    Args:
        decoder: what reads.
        room: bytes that all of them together may take.
    """

    def __init__(self, decoder: Any, room: float):
        self.decoder, self.room = decoder, room
        self._kept: list[Reading] = []  # the latest last

    def take(self, row: Row, ends: Sequence[int], with_adapter: bool) -> Reading:
        """The reading of the longest beginning of a row; an empty one if no conversation began like it.

        The last piece is always left to read, since what follows it is wanted. A conversation that goes on takes its
        reading along; one that only begins like another leaves that one its own.

        Args:
            ends: where the pieces end in which the row is read; the last is the row's own end.
        """
        alike = [reading for reading in self._kept if reading.with_adapter == with_adapter]
        best = max(alike, key=lambda reading: _common(reading.row, row), default=None)
        common = _common(best.row, row) if best else 0
        length = max((end for end in ends[:-1] if end <= common), default=0)
        if not length:
            return Reading(with_adapter, self.decoder.empty_cache())
        if length < len(best.row) // 2:
            return Reading(with_adapter, best.cache.beginning(length), row[:length])
        self._kept.remove(best)
        best.shorten(row[:length])
        return best

    def keep(self, reading: Reading) -> None:
        """Puts a reading back, and drops the oldest that have no room."""
        self._kept.append(reading)
        while len(self._kept) > 1 and sum(kept.cache.size for kept in self._kept) > self.room:
            self._kept.pop(0)
        if reading.cache.size > self.room:
            self._kept.clear()


def _common(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """How many items two rows have in common at their beginning."""
    return next(
        (place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )
