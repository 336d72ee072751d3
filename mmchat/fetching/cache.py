"""The cache folder of fetched and converted files. Every file in it is complete."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import AssetError

MANIFEST = "files.json"  # beside converted weights: file name -> size in bytes


def cache_folder() -> Path:
    """The cache folder: ``MMCHAT_CACHE``, or ``~/.cache/mmchat``."""
    return Path(os.environ.get("MMCHAT_CACHE") or Path.home() / ".cache" / "mmchat").expanduser()


def convert_once(name: str, convert: Callable[[Path], None]) -> Path:
    """Returns the folder ``name`` of the cache, filled by ``convert(folder)`` the first time.

    The conversion writes into a temporary folder, which is renamed when it is complete.
    """
    folder = cache_folder() / name
    if is_converted(folder):
        return folder
    with locked(folder) as unfinished:
        if not is_converted(folder):  # another process may have converted it while this one waited
            convert(unfinished)
            files = [path for path in unfinished.rglob("*") if path.is_file()]
            sizes = {path.relative_to(unfinished).as_posix(): path.stat().st_size for path in files}
            (unfinished / MANIFEST).write_text(json.dumps(sizes, indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
    return folder


def remove_oldest(pattern: str, budget_bytes: float, used: Collection[Path]) -> None:
    """Removes converted folders that match a pattern, the least recently used first, until the others fit the budget.

    Args:
        used: folders that are kept, however large, and count as used now.
    """
    with suppress(OSError):  # another process may remove the same ones, and a cache may be read-only
        for folder in used:
            (folder / MANIFEST).touch()
        manifests = cache_folder().glob(f"{pattern}/{MANIFEST}")
        total = 0
        for manifest in sorted(manifests, key=lambda path: path.stat().st_mtime, reverse=True):
            total += sum(json.loads(manifest.read_text()).values())
            if total > budget_bytes and manifest.parent not in used:
                shutil.rmtree(manifest.parent, ignore_errors=True)


def is_complete(path: Path, size: int) -> bool:
    """Whether a file exists and has its full size."""
    return path.is_file() and path.stat().st_size == size


def is_converted(folder: Path) -> bool:
    """Whether a folder that ``convert_once`` filled is complete."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return all(is_complete(folder / name, size) for name, size in sizes.items())


def unfinished_folder(folder: Path) -> Path:
    """The temporary folder that holds the files of a cache folder until they are complete."""
    return folder.with_name(f".{folder.name}.unfinished")


@contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """Locks ``folder`` for one process and yields an empty temporary folder beside it, removed at the end.

    The temporary name is always the same, so the next process removes what a killed one left behind.

    Raises:
        AssetError: the cache folder cannot be written.
    """
    from filelock import FileLock

    unfinished = unfinished_folder(folder)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise _unusable_cache(error) from error
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise _unusable_cache(error) from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        lock.release()


def _unusable_cache(error: OSError) -> AssetError:
    return AssetError(
        f"The cache folder {cache_folder()} cannot be used ({error.strerror}). "
        "Set MMCHAT_CACHE to a writable folder with 1.5 GB of free space."
    )
