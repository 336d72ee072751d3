"""Reads WordNet's nouns from its own files (Miller 1995, "WordNet: A Lexical Database for English")."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import BadInput

VERSION = "WordNet 3.0"  # other versions number their synsets differently


@dataclass(frozen=True)
class Synset:
    """A set of synonyms, and the synsets of its hypernyms."""

    words: tuple[str, ...]
    hypernyms: tuple[int, ...]


class WordNet:
    """The nouns in a folder with WordNet 3.0's ``data.noun`` and ``index.noun``.

    A synset's number, such as the digits of n02084071, is the byte offset of its line in ``data.noun``.

    Raises:
        BadInput: the folder lacks these files, or they belong to another version.
    """

    def __init__(self, folder: str | Path):
        try:
            self._data = (Path(folder) / "data.noun").read_bytes()
            index = (Path(folder) / "index.noun").read_text(encoding="utf-8")
            self._senses = dict(map(_index_entry, filter(_is_entry, index.splitlines())))
        except OSError as error:
            raise BadInput(
                f"'{folder}' does not hold WordNet: {Path(error.filename).name} cannot be read ({error.strerror})."
            ) from error
        except (ValueError, IndexError) as error:
            raise BadInput(f"index.noun in '{folder}' is not WordNet's index of nouns.") from error
        if VERSION.encode() not in self._data[:4096]:
            raise BadInput(
                f"data.noun in '{folder}' is not from {VERSION}: use that version, since others number synsets "
                "differently."
            )

    def senses(self, word: str) -> tuple[int, ...]:
        """The synsets of a noun, the most frequent first."""
        return self._senses.get(word.lower().replace(" ", "_"), ())

    def synset(self, number: int) -> Synset:
        """The synset with this number.

        Raises:
            BadInput: WordNet has no such synset.
        """
        line = self._data[number : max(self._data.find(b"\n", number), number)].decode(errors="replace")
        if not line.startswith(f"{number:08d} "):
            raise BadInput(f"n{number:08d} is not a noun of {VERSION}: correct the number or omit it.")
        fields = line.split(" | ")[0].split()
        word_count = int(fields[3], 16)
        pointers = fields[5 + 2 * word_count :]  # for each pointer: symbol, offset, part of speech, words
        return Synset(
            tuple(word.replace("_", " ") for word in fields[4 : 4 + 2 * word_count : 2]),
            tuple(int(other) for symbol, other in zip(pointers[::4], pointers[1::4], strict=False) if symbol[0] == "@"),
        )

    def upwards(self, number: int) -> Iterator[int]:
        """A synset and all its hypernyms, the nearest first."""
        found = [number]
        for one in found:
            yield one
            found += [other for other in self.synset(one).hypernyms if other not in found]


def _is_entry(line: str) -> bool:
    return bool(re.match(r"\S", line))  # the license text is indented


def _index_entry(line: str) -> tuple[str, tuple[int, ...]]:
    fields = line.split()
    return fields[0], tuple(map(int, fields[-int(fields[2]) :]))
