"""Files that come with mmchat but are no Python: weights, examples, and what a Space needs."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
INSIDE = "bundled"  # the folder that setup.py adds to the package in a wheel


def bundled(name: str) -> Path:
    """Where a bundled file or folder is: in a checkout beside the package, in an installed wheel inside it.

    Args:
        name: its path below the root of a checkout, such as ``weights`` or ``README.md``.
    """
    installed = PACKAGE / INSIDE
    return (installed if installed.is_dir() else PACKAGE.parent) / name
