"""Stores visitors' thumbs and better answers as training data, where the operator asks for it with MMCHAT_FEEDBACK."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..conversation import DEFAULT_QUESTION, Message
from ..errors import BadInput
from ..media import decode_image

MAX_ENTRIES = 10_000  # in each file
MAX_TEXT = 4_000  # characters in a question or an answer
MAX_SIDE = 1024  # pixels; a stored picture is scaled down, and its EXIF data is left out
IMAGE_MARK = "<image>"
TO_VISITORS = "Thumbs, better answers and the pictures they are about are stored on this server, to train the model."


class FeedbackStore:
    """A folder of feedback: what to train on, what was disliked, and the pictures.

    ``conversations.json`` holds liked and corrected answers as LLaVA-Instruct JSON, for ``finetune_qlora.py``;
    ``disliked.json``, in the same format, answers that nobody corrected. Files are replaced in one step, so a reader
    or a crash never meets half of one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"MMCHAT_FEEDBACK: the folder '{self.folder.name}' cannot be made.") from error
        self._lock = FileLock(self.folder / ".lock")

    def add(self, messages: Sequence[Message], liked: bool, better: str = "") -> None:
        """Stores the feedback on the last message, which is the answer.

        Only the last question and its pictures are stored, not the conversation before it.

        Raises:
            BadInput: there is nothing to store, it is too long, or the folder is full.
        """
        question, answer, pictures = _last_turn(messages)
        better = _clean(better)
        if len(better) > MAX_TEXT or len(question) > MAX_TEXT or len(answer) > 4 * MAX_TEXT:
            raise BadInput(f"Please keep the better answer under {MAX_TEXT} characters.")
        good_answer = better or (answer if liked else "")
        name = "conversations.json" if good_answer else "disliked.json"
        with self._lock:
            entries = _read(self.folder / name)
            if len(entries) >= MAX_ENTRIES:
                raise BadInput("This server has all the feedback that it can keep. Thank you!")
            entry = _entry(question, [self._keep(picture) for picture in pictures], good_answer or answer)
            # The latest rating of a question replaces earlier ones: contradictions teach nothing.
            entries = [old for old in entries if old["id"] != entry["id"]]
            extra = {"liked": liked, **({"said": answer} if better else {})}
            _replace(self.folder / name, [*entries, {**entry, **extra}])
            self._forget(entry["id"], "disliked.json" if good_answer else "conversations.json")

    def _forget(self, identifier: str, name: str) -> None:
        """Removes an earlier rating of the same question from the other file."""
        entries = _read(self.folder / name)
        kept = [old for old in entries if old["id"] != identifier]
        if len(kept) < len(entries):
            _replace(self.folder / name, kept)

    def _keep(self, picture: Any) -> str:
        """Stores a picture under the digest of its content and returns its file name."""
        image = decode_image(picture)
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        image.info.clear()
        data = io.BytesIO()
        kind = "png" if max(image.size) <= 128 else "jpeg"
        image.save(data, kind, quality=95)
        path = self.folder / "pictures" / f"{hashlib.sha256(data.getvalue()).hexdigest()[:32]}.{kind}"
        if not path.exists():
            _write(path, data.getvalue())
        return path.name


def _last_turn(messages: Sequence[Message]) -> tuple[str, str, Sequence[Any]]:
    """The last question, its answer, and the pictures that were shown last, which the question is about."""
    if len(messages) < 2 or messages[-1].role != "assistant" or messages[-2].role != "user":
        raise BadInput("There is no answer to rate.")
    shown = next((message.images for message in reversed(messages[:-1]) if message.images), ())
    question, answer = _clean(messages[-2].text), _clean(messages[-1].text)
    if not answer or not (question or shown):
        raise BadInput("There is no answer to rate.")
    return question or DEFAULT_QUESTION, answer, shown


def _clean(text: str) -> str:
    """Text that the format can hold: without the picture's mark, and valid Unicode."""
    return text.replace(IMAGE_MARK, "").encode("utf-8", "replace").decode().strip()


def _entry(question: str, images: list[str], answer: str) -> dict[str, Any]:
    """An entry of LLaVA-Instruct: one mark per picture, and a list of names where there are several."""
    image = images[0] if len(images) == 1 else images or None
    identifier = hashlib.sha256(json.dumps([question, image]).encode()).hexdigest()[:16]
    asked = "\n".join([*[IMAGE_MARK] * len(images), question])
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": identifier, **({"image": image} if image else {}), "conversations": turns}


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return entries
    except FileNotFoundError:
        return []


def _replace(path: Path, entries: list[dict[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    _write(path, f"[\n{lines}\n]\n".encode())


def _write(path: Path, content: bytes) -> None:
    """Writes a file aside and renames it."""
    aside = path.with_suffix(".part")
    with aside.open("wb") as sink:
        sink.write(content)
        sink.flush()
        os.fsync(sink.fileno())
    aside.replace(path)
