"""LLaVA-Instruct JSON, the format of all training data: streaming reader, checks, writer.

The format is that of LLaVA (Liu et al. 2023, arXiv 2304.08485): a list of
``{"id", "image", "conversations": [{"from": "human" | "gpt", "value": text}, …]}``, with ``<image>`` in the human text
where the picture stands.
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
CHUNK = 1 << 20  # characters per read


@dataclass(frozen=True)
class Conversation:
    """A training example: messages whose images are file names."""

    id: str
    messages: tuple[Message, ...]

    @property
    def images(self) -> tuple[str, ...]:
        """The file names, in the order of the messages."""
        return tuple(image for message in self.messages for image in message.images)


def read_conversations(path: str | Path) -> Iterator[Conversation]:
    """Streams the conversations of a file; memory does not grow with its size.

    Raises:
        BadInput: the file is unreadable or malformed; the message names the file and the line.
    """
    path = Path(path)
    count = 0
    for line, entry in stream_entries(path):
        count += 1
        yield conversation_of(entry, f"{path.name}, line {line}")
    if not count:
        raise BadInput(f"{path.name} holds no conversations.")


def write_conversations(path: str | Path, entries: Iterable[dict]) -> int:
    """Writes LLaVA-Instruct entries as a JSON list, one per line, and returns their number."""
    count = 0
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", encoding="utf-8") as sink:
        for count, entry in enumerate(entries, start=1):
            sink.write(("[\n" if count == 1 else ",\n") + json.dumps(entry, ensure_ascii=False))
        sink.write("\n]\n" if count else "[]\n")
    return count


def entry_of(identifier: str, image: str | None, turns: Sequence[tuple[str, str]], **extra: Any) -> dict:
    """A LLaVA-Instruct entry of questions and answers, with the picture before the first question.

    Args:
        extra: further fields of the entry. Training ignores them; evaluate.py reads ``kind``, ``references`` and
            ``accepted``.
    """
    messages = []
    for index, (question, answer) in enumerate(turns):
        text = f"{IMAGE_MARK}\n{question}" if image and index == 0 else question
        messages.append({"from": "human", "value": text})
        messages.append({"from": "gpt", "value": answer})
    return {"id": identifier, **({"image": image} if image else {}), "conversations": messages, **extra}


def split_by_image(path: str | Path, share: float, rng: Any) -> tuple[list[dict], list[dict]]:
    """Splits the entries of a file into two parts; all entries about a picture go to the same part.

    Args:
        share: the fraction of the pictures, 0 to 1, that goes to the second part.
        rng: a ``random.Random``.

    Raises:
        BadInput: the file is not a list of conversations, or ``share`` is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise BadInput("The share must be between 0 and 1.")
    entries = [entry for _, entry in stream_entries(Path(path))]
    if not all(isinstance(entry, dict) for entry in entries):
        raise BadInput(f"{Path(path).name} is not a list of conversations.")
    pictures = sorted({str(entry.get("image")) for entry in entries})
    chosen = set(rng.sample(pictures, round(share * len(pictures))))
    return tuple(
        [entry for entry in entries if (str(entry.get("image")) in chosen) == second] for second in (False, True)
    )


def stream_entries(path: Path) -> Iterator[tuple[int, Any]]:
    """Streams the elements of a JSON list, each with the line on which it begins.

    Raises:
        BadInput: the file is unreadable or not a JSON list.
    """
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
    """The text that has been read from a file and not yet parsed."""

    def __init__(self, source: Any):
        self.source = source
        self.text = ""
        self.line = 1

    def advance(self, count: int) -> None:
        self.line += self.text.count("\n", 0, count)
        self.text = self.text[count:]

    def more(self) -> bool:
        chunk = self.source.read(max(CHUNK, len(self.text)))  # doubles the window, so a long entry is parsed few times
        self.text += chunk
        return bool(chunk)

    def next_character(self) -> str:
        """Peeks at the next character that is not whitespace; empty at the end of the file."""
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


def conversation_of(entry: Any, label: str) -> Conversation:
    """Checks and converts an entry.

    Args:
        label: names the entry in errors.

    Raises:
        BadInput: the entry is malformed.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        raise BadInput(f'{label}: an entry needs a list "conversations".')
    image = entry.get("image")
    images = image if isinstance(image, list) else [] if image is None else [image]
    if not all(isinstance(name, str) for name in images) or image == []:
        raise BadInput(f'{label}: "image" must be a file name, or a list of them.')
    if not isinstance(image, list):  # one picture, which every mark shows
        messages = tuple(_message(turn, images, label) for turn in entry["conversations"])
    else:
        messages = _messages(entry["conversations"], images, label)
    if not any(message.role == "assistant" for message in messages):
        raise BadInput(f"{label}: there is no answer to train on.")
    return Conversation(str(entry.get("id", label)), messages)


def _messages(turns: Sequence[Any], images: list[str], label: str) -> tuple[Message, ...]:
    """The messages of an entry with several pictures: each mark shows the next one."""
    messages, marks, shown = [], 0, 0
    for turn in turns:
        text = turn.get("value") if isinstance(turn, dict) and turn.get("from") == "human" else ""
        marks += text.count(IMAGE_MARK) if isinstance(text, str) else 0
        messages.append(_message(turn, images[shown:marks], label))
        shown = marks
    if marks != len(images):
        raise BadInput(f"{label}: {len(images)} pictures need as many {IMAGE_MARK}, not {marks}.")
    return tuple(messages)


def _message(turn: Any, images: Sequence[str], label: str) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or turn.get("from") not in SPEAKERS:
        raise BadInput(f'{label}: a turn needs "from" ({", ".join(SPEAKERS)}) and a text "value".')
    text, speaker = turn["value"], turn["from"]
    shows = IMAGE_MARK in text and speaker == "human"
    if shows and not images:
        raise BadInput(f'{label}: a turn has {IMAGE_MARK}, but the entry has no "image" for it.')
    return Message(
        SPEAKERS[speaker], (text.replace(IMAGE_MARK, "") if shows else text).strip(), images if shows else []
    )
