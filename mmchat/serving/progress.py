"""How much has been fetched: the size of the files that a first start downloads, while it does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ..fetching.cache import cache_folder

MEGABYTE = 1e6


class FetchProgress:
    """Measures how much the cache folders grow from now on.

    Args:
        folders: the folders that downloads go to; the cache of mmchat and the one of the Hub if None.
    """

    def __init__(self, folders: Iterable[Path] | None = None):
        self._folders = list(folders) if folders is not None else [cache_folder(), hub_folder()]
        self._before = self._size()

    def megabytes(self) -> int:
        """Megabytes fetched so far."""
        return max(round((self._size() - self._before) / MEGABYTE), 0)

    def _size(self) -> int:
        return sum(_size(folder) for folder in self._folders)


def hub_folder() -> Path:
    """The cache folder of the Hugging Face Hub's client, without importing it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def _size(folder: Path) -> int:
    """Bytes of all files below a folder; files may vanish meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total


def sentence(progress: Callable[[], int]) -> str:
    """What a visitor reads while the models load."""
    megabytes = progress()
    return f"{megabytes} MB fetched" if megabytes else ""
