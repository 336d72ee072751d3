"""Assembles and checks the files of a Hugging Face Space."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ..bundle import INSIDE, PACKAGE, bundled
from ..errors import BadInput

SCREENSHOTS = ("docs/page.png", "docs/page-dark.png", "docs/page-phone.png")
FILES = ("app.py", "weights", "examples", "requirements.txt", "README.md", "LICENSE", *SCREENSHOTS)
IGNORED_PATTERNS = ("__pycache__", "*.pyc", "*.pyi", ".*", INSIDE)
MAX_FILE_SIZE = 10_000_000  # bytes; the Hub requires LFS for larger files
FRONT_MATTER = ("title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file", "license")


def assemble(out: str | Path) -> list[Path]:
    """Copies the files of a Space into an empty folder and checks them.

    Returns:
        The paths of the files relative to the folder.

    Raises:
        BadInput: the folder is not empty, or the result would not run as a Space.
    """
    out = Path(out)
    if out.is_dir() and any(out.iterdir()):
        raise BadInput(f"{out} is not empty. Name another folder, or empty it.")
    for name, source in {"mmchat": PACKAGE, **{name: bundled(name) for name in FILES}}.items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*IGNORED_PATTERNS))
        else:
            shutil.copy(source, target)
    return check(out)


def check(folder: Path) -> list[Path]:
    """Checks that a folder would run as a Space, and returns its files.

    Raises:
        BadInput: it would not run; the message says why.
    """
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for file in files:
        size = (folder / file).stat().st_size
        if size > MAX_FILE_SIZE:
            raise BadInput(f"{file} has {size / 1e6:.0f} MB. Files above {MAX_FILE_SIZE / 1e6:.0f} MB need LFS.")
    settings = front_matter(folder / "README.md")
    missing = [key for key in FRONT_MATTER if not settings.get(key)]
    if missing:
        raise BadInput(f"The front matter of README.md lacks {', '.join(missing)}. Add them.")
    if settings["sdk"] != "gradio" or not (folder / settings["app_file"]).is_file():
        raise BadInput(
            f"The front matter of README.md must name an app of gradio, not {settings['sdk']}, {settings['app_file']}."
        )
    if len(settings.get("short_description", "")) > 60:
        raise BadInput(
            "The short description in README.md is longer than the 60 characters that a Space shows. Shorten it."
        )
    return files


def front_matter(readme: Path) -> dict[str, str]:
    """Parses the YAML settings at the top of a Space's README."""
    found = re.match(r"---\n(.*?)\n---\n", readme.read_text(encoding="utf-8"), re.DOTALL)
    lines = found[1].splitlines() if found else []
    return {key.strip(): value.strip().strip("\"'") for key, _, value in (line.partition(":") for line in lines)}
