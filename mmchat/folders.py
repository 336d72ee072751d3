"""Folders that commands write."""

from __future__ import annotations

from pathlib import Path

from .errors import BadInput


def empty_folder(path: str | Path) -> Path:
    """A folder to write: one that is empty, or does not exist yet.

    Raises:
        BadInput: it holds files, which would be overwritten or mixed with new ones, or is a file.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{path} is a file. Name a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise BadInput(f"{path} is not empty. Name another folder, or empty it.")
    return folder
