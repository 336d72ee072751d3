"""The files of a Hugging Face Space: put together in a folder, and checked."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ..bundle import INSIDE, PACKAGE, bundled
from ..errors import BadInput

PARTS = ("app.py", "weights", "examples", "requirements.txt", "README.md", "LICENSE", "docs/page.png")
LEFT_OUT = ("__pycache__", "*.pyc", "*.pyi", ".*", INSIDE)
LARGEST_FILE = 10_000_000  # bytes; the Hub wants larger ones in LFS
FRONT_MATTER = ("title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file", "license")


def assemble(out: str | Path) -> list[Path]:
    """Copies what a Space needs into an empty folder, and checks it.

    Returns:
        The files, by their names below the folder.

    Raises:
        BadInput: the folder is not empty, or something in it would not run as a Space.
    """
    out = Path(out)
    if out.is_dir() and any(out.iterdir()):
        raise BadInput(f"{out} is not empty. Name another folder, or empty it.")
    for name, source in {"mmchat": PACKAGE, **{name: bundled(name) for name in PARTS}}.items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*LEFT_OUT))
        else:
            shutil.copy(source, target)
    return check(out)


def check(folder: Path) -> list[Path]:
    """The files of a Space's folder, if it would run as one.

    Raises:
        BadInput: it would not; the sentence names what is wrong.
    """
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for file in files:
        size = (folder / file).stat().st_size
        if size > LARGEST_FILE:
            raise BadInput(f"{file} has {size / 1e6:.0f} MB; at most {LARGEST_FILE / 1e6:.0f} go without LFS.")
    settings = front_matter(folder / "README.md")
    missing = [key for key in FRONT_MATTER if not settings.get(key)]
    if missing:
        raise BadInput(f"The front matter of README.md lacks {', '.join(missing)}.")
    if settings["sdk"] != "gradio" or not (folder / settings["app_file"]).is_file():
        raise BadInput(
            f"The front matter of README.md names no app of gradio: {settings['sdk']}, {settings['app_file']}."
        )
    if len(settings.get("short_description", "")) > 60:
        raise BadInput("The short description in README.md is longer than the 60 characters that a Space shows.")
    return files


def front_matter(readme: Path) -> dict[str, str]:
    """The settings at the top of a Space's README."""
    found = re.match(r"---\n(.*?)\n---\n", readme.read_text(encoding="utf-8"), re.DOTALL)
    lines = found[1].splitlines() if found else []
    return {key.strip(): value.strip().strip("\"'") for key, _, value in (line.partition(":") for line in lines)}
