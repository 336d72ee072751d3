"""The files beside this one that the browser gets."""

from __future__ import annotations

from importlib.resources import files


def asset(name: str) -> str:
    """The text of a script or style sheet of the page."""
    return (files(__package__) / name).read_text(encoding="utf-8")
