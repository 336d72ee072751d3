"""Reads recordings with their transcripts, to evaluate speech recognition."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ...errors import BadInput


@dataclass(frozen=True)
class Recording:
    """A recording and its transcript."""

    name: str  # the path in the list, relative to the list's folder
    path: Path
    text: str


def read_recordings(path: str | Path) -> list[Recording]:
    """Reads a JSON list of ``{"audio": path, "text": transcript}``.

    Raises:
        BadInput: the file is unreadable or malformed, or a recording does not exist.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path.name} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path.name} is not JSON.") from error
    if not isinstance(entries, list) or not entries:
        raise BadInput(f'{path.name} must be a list of {{"audio": path, "text": transcript}}.')
    return [_recording(entry, number, path) for number, entry in enumerate(entries, start=1)]


def _recording(entry: object, number: int, source: Path) -> Recording:
    found = entry if isinstance(entry, dict) else {}
    name, text = found.get("audio"), found.get("text")
    if not (isinstance(name, str) and isinstance(text, str) and name and text.strip()):
        raise BadInput(f'{source.name}, entry {number} is not {{"audio": path, "text": transcript}}.')
    if not (source.parent / name).is_file():
        raise BadInput(f"{source.name}, entry {number}: there is no recording '{name}'.")
    return Recording(name, source.parent / name, text)
