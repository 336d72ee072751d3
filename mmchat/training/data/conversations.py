"""LLaVA-Instruct JSON, the one format of training data: read as it is, streamed, checked, written.

The format is LLaVA's own (Liu et al. 2023, arXiv 2304.08485): a list of
``{"id", "image", "conversations": [{"from": "human" | "gpt", "value": text}, …]}`` with ``<image>`` in the human text
where the picture is shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...conversation import Message
from ...errors import BadInput

IMAGE_MARK = "<image>"
SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}
CHUNK = 1 << 20  # characters read at a time


@dataclass(frozen=True)
class Conversation:
    """One training example: messages whose pictures are file names."""

    id: str
    messages: tuple[Message, ...]

    @property
    def images(self) -> tuple[str, ...]:
        """In reading order."""
        return tuple(image for message in self.messages for image in message.images)


def read_conversations(path: str | Path) -> Iterator[Conversation]:
    """The conversations of a file, one after the other, so that a file of any size takes little memory.

    Raises:
        BadInput: it is no such file; the message names the file and the line.
    """
    path = Path(path)
    count = 0
    for line, entry in stream_entries(path):
        count += 1
        yield conversation_of(entry, f"{path.name}, line {line}")
    if not count:
        raise BadInput(f"{path.name} holds no conversations.")


def write_conversations(path: str | Path, entries: Iterable[dict]) -> int:
    """Writes LLaVA-Instruct entries, one on each line of a JSON list, and returns how many."""
    count = 0
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", encoding="utf-8") as sink:
        for count, entry in enumerate(entries, start=1):
            sink.write(("[\n" if count == 1 else ",\n") + json.dumps(entry, ensure_ascii=False))
        sink.write("\n]\n" if count else "[]\n")
    return count


def entry_of(identifier: str, image: str | None, turns: Sequence[tuple[str, str]], **extra: Any) -> dict:
    """A LLaVA-Instruct entry of questions and answers, the picture shown with the first question.

    ``extra`` fields are carried along and ignored in training; evaluate.py reads ``kind``, ``references`` and
    ``accepted``.
    """
    spoken = []
    for number, (question, answer) in enumerate(turns):
        shown = f"{IMAGE_MARK}\n{question}" if image and number == 0 else question
        spoken.append({"from": "human", "value": shown})
        spoken.append({"from": "gpt", "value": answer})
    return {"id": identifier, **({"image": image} if image else {}), "conversations": spoken, **extra}


def split_by_image(path: str | Path, share: float, rng: Any) -> tuple[list[dict], list[dict]]:
    """The entries of a file in two parts; those about one picture stay together.

    Args:
        share: of the pictures, 0 to 1, that go to the second part.
        rng: a ``random.Random``.
    """
    entries = [entry for _, entry in stream_entries(Path(path))]
    pictures = sorted({str(entry.get("image")) for entry in entries})
    apart = set(rng.sample(pictures, round(share * len(pictures))))
    return tuple(
        [entry for entry in entries if (str(entry.get("image")) in apart) == second] for second in (False, True)
    )


def stream_entries(path: Path) -> Iterator[tuple[int, Any]]:
    """The members of a JSON list, each with the line on which it begins."""
    decoder = json.JSONDecoder()
    try:
        with path.open(encoding="utf-8") as source:
            window = _Window(source)
            if window.next_character() != "[":
                raise BadInput(f"{path.name} is not a list of conversations.")
            window.advance(1)
            while window.next_character() != "]":
                yield window.line, window.decode(decoder, path.name)
                if window.next_character() == ",":
                    window.advance(1)
                elif window.next_character() != "]":
                    raise BadInput(f"{path.name}, line {window.line}: a comma or the end of the list is missing.")
    except OSError as error:
        raise BadInput(f"{path.name} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path.name} is not text in UTF-8.") from error


class _Window:
    """The part of a file that has been read and not yet used."""

    def __init__(self, source: Any):
        self.source = source
        self.text = ""
        self.line = 1

    def advance(self, count: int) -> None:
        self.line += self.text.count("\n", 0, count)
        self.text = self.text[count:]

    def more(self) -> bool:
        chunk = self.source.read(max(CHUNK, len(self.text)))  # doubling, so that a long entry is not parsed often
        self.text += chunk
        return bool(chunk)

    def next_character(self) -> str:
        """The next one that is no space, without using it up; empty at the end of the file."""
        while True:
            space = len(self.text) - len(self.text.lstrip())
            if space < len(self.text):
                self.advance(space)
                return self.text[0]
            self.advance(space)
            if not self.more():
                return ""

    def decode(self, decoder: json.JSONDecoder, name: str) -> Any:
        while True:
            try:
                entry, end = decoder.raw_decode(self.text)
            except ValueError as error:
                if not self.more():
                    line = self.line + self.text.count("\n", 0, getattr(error, "pos", 0))
                    raise BadInput(f"{name}, line {line}: this is not JSON ({error}).") from error
            else:
                self.advance(end)
                return entry


def conversation_of(entry: Any, place: str) -> Conversation:
    """One entry, checked; ``place`` names it in the message of BadInput."""
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        raise BadInput(f'{place}: an entry needs a list "conversations".')
    image = entry.get("image")
    if image is not None and not isinstance(image, str):
        raise BadInput(f'{place}: "image" must be a file name.')
    messages = tuple(_message(turn, image, place) for turn in entry["conversations"])
    if not any(message.role == "assistant" for message in messages):
        raise BadInput(f"{place}: there is no answer to learn from.")
    return Conversation(str(entry.get("id", place)), messages)


def _message(turn: Any, image: str | None, place: str) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or turn.get("from") not in SPEAKERS:
        raise BadInput(f'{place}: a turn needs "from" ({", ".join(SPEAKERS)}) and a text "value".')
    text, speaker = turn["value"], turn["from"]
    shows = IMAGE_MARK in text and speaker == "human"
    if shows and image is None:
        raise BadInput(f'{place}: a turn shows {IMAGE_MARK}, but the entry has no "image".')
    return Message(
        SPEAKERS[speaker], (text.replace(IMAGE_MARK, "") if shows else text).strip(), [image] if shows else []
    )
