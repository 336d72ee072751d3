"""Bundled files other than Python: weights, examples, and what a Space needs."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
INSIDE = "bundled"  # the folder that setup.py adds inside the package when it builds a wheel


def bundled(name: str) -> Path:
    """Path of a bundled file or folder: beside the package in a checkout, inside it in an installed wheel.

    Args:
        name: path relative to the root of a checkout, such as ``weights`` or ``README.md``.
    """
    installed = PACKAGE / INSIDE
    return (installed if installed.is_dir() else PACKAGE.parent) / name
