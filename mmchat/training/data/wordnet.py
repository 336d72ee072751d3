"""WordNet's nouns, read from its own files (Miller 1995, "WordNet: A Lexical Database for English")."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import BadInput

VERSION = "WordNet 3.0"  # other versions number their synsets differently


@dataclass(frozen=True)
class Synset:
    """Words that mean the same thing, and the synsets of what it is a kind of."""

    words: tuple[str, ...]
    hypernyms: tuple[int, ...]


class WordNet:
    """The nouns of a folder with WordNet 3.0's ``data.noun`` and ``index.noun``.

    A synset's number, the digits of n02084071, is the byte in ``data.noun`` at which its line starts.

    Raises:
        BadInput: the folder does not hold these files, or those of another version.
    """

    def __init__(self, folder: str | Path):
        try:
            self._data = (Path(folder) / "data.noun").read_bytes()
            index = (Path(folder) / "index.noun").read_text(encoding="utf-8")
            self._senses = dict(map(_index_entry, filter(_is_entry, index.splitlines())))
        except OSError as error:
            raise BadInput(
                f"{folder} does not hold WordNet: {Path(error.filename).name} cannot be read ({error.strerror})."
            ) from error
        except (ValueError, IndexError) as error:
            raise BadInput(f"index.noun in {folder} is not WordNet's index of nouns.") from error
        if VERSION.encode() not in self._data[:4096]:
            raise BadInput(f"data.noun in {folder} is not {VERSION}'s, and other versions number things differently.")

    def senses(self, word: str) -> tuple[int, ...]:
        """The synsets of a noun, the most frequent first."""
        return self._senses.get(word.lower().replace(" ", "_"), ())

    def synset(self, number: int) -> Synset:
        """Raises BadInput: there is none of this number."""
        line = self._data[number : max(self._data.find(b"\n", number), number)].decode(errors="replace")
        if not line.startswith(f"{number:08d} "):
            raise BadInput(f"n{number:08d} is not a noun of {VERSION}: correct the number or leave it out.")
        fields = line.split(" | ")[0].split()
        word_count = int(fields[3], 16)
        pointers = fields[5 + 2 * word_count :]  # symbol, number, part of speech, and words of each
        return Synset(
            tuple(word.replace("_", " ") for word in fields[4 : 4 + 2 * word_count : 2]),
            tuple(int(other) for symbol, other in zip(pointers[::4], pointers[1::4], strict=False) if symbol[0] == "@"),
        )

    def upwards(self, number: int) -> Iterator[int]:
        """A synset and all that it is a kind of, the nearest first."""
        found = [number]
        for one in found:
            yield one
            found += [other for other in self.synset(one).hypernyms if other not in found]


def _is_entry(line: str) -> bool:
    return bool(re.match(r"\S", line))  # the license's lines are indented


def _index_entry(line: str) -> tuple[str, tuple[int, ...]]:
    fields = line.split()
    return fields[0], tuple(map(int, fields[-int(fields[2]) :]))
