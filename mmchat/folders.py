"""Folders and files that commands write."""

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


def check_writable(path: str | Path) -> None:
    """Makes the folder of a file that will be written at the end of long work, and checks that it can be written.

    Raises:
        BadInput: it cannot.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("a"):
            pass
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}.") from error
