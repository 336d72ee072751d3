"""Assembles and checks the files of a Hugging Face Space."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from ..bundle import INSIDE, PACKAGE, bundled
from ..checkpoints.importing import PUBLISHED_FILES
from ..checkpoints.weights_folder import default_weights
from ..errors import BadInput
from ..fetching.hub import files_on_hub
from ..fetching.sources import HubRepository
from ..folders import empty_folder
from ..presets import SMOL, Preset, get_preset

logger = logging.getLogger(__name__)

SCREENSHOTS = ("docs/page.png", "docs/page-dark.png", "docs/page-phone.png")
FILES = ("app.py", "weights", "examples", "requirements.txt", "README.md", "LICENSE", *SCREENSHOTS)
IGNORED_PATTERNS = ("__pycache__", "*.pyc", "*.pyi", ".*", INSIDE)
GPU_PACKAGES = ("accelerate>=1.10", "bitsandbytes>=0.48")
# ZeroGPU's documentation says "2.1.0 to latest", but its list ended with 2.8.0 when this was written, and nothing here
# ran on ZeroGPU: raise the bound when the list has a newer one.
ZERO_GPU_TORCH = "torch>=2.8,<2.9"
MAX_FILE_SIZE = 10_000_000  # bytes; the Hub requires LFS for larger files
FRONT_MATTER = ("title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file", "license")


def assemble(out: str | Path, preset: str = SMOL.name) -> list[Path]:
    """Copies the files of a Space into an empty folder and checks them.

    Args:
        preset: what the Space answers with. One with models on the Hub gets a Space for ZeroGPU: the packages for
            quantized weights, a PyTorch that ZeroGPU runs, and its models fetched when the Space is built.

    Returns:
        The paths of the files relative to the folder.

    Raises:
        BadInput: the folder is not empty, or the result would not run as a Space.
        WeightsError: no weights come with the preset.
    """
    out, chosen = empty_folder(out), get_preset(preset)
    if isinstance(chosen.weights, Path):
        default_weights(chosen)  # raises if there are none
    for name, source in {"mmchat": PACKAGE, **{name: bundled(name) for name in FILES}}.items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(*IGNORED_PATTERNS))
        else:
            shutil.copy(source, target)
    if preset != SMOL.name:
        _for_zero_gpu(out, chosen)
    return check(out)


def _for_zero_gpu(out: Path, preset: Preset) -> None:
    """Adds what a preset with models on the Hub needs."""
    path = out / "requirements.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = [ZERO_GPU_TORCH if re.match(r"torch\b", line) else line for line in lines]
    path.write_text("\n".join([*lines, *GPU_PACKAGES]) + "\n", encoding="utf-8")
    sources = [source for source in dict.fromkeys(preset.sources.values()) if isinstance(source, HubRepository)]
    preload = "".join(f"  - {_preload(source, preset)}\n" for source in sources)
    readme = out / "README.md"
    text = readme.read_text(encoding="utf-8")
    settings = f"suggested_hardware: zero-a10g\npreload_from_hub:\n{preload}"
    end = text.index("---\n", 4)  # of the front matter
    readme.write_text(text[:end] + settings + text[end:], encoding="utf-8")
    app = out / "app.py"
    code = app.read_text(encoding="utf-8")
    app.write_text(code.replace('["serve", ', f'["serve", "--preset", "{preset.name}", '), encoding="utf-8")


def _preload(source: HubRepository, preset: Preset) -> str:
    """An item of ``preload_from_hub``: a repository, or the files of a commit, which the Hub must list for that."""
    if not source.revision:
        return source.name
    is_checkpoint = source == preset.weights and not preset.language_model.is_llava
    files = PUBLISHED_FILES if is_checkpoint else files_on_hub(source)
    if not files:
        logger.warning("The Hub does not list the files of %s now, so the Space preloads the latest ones", source.name)
        return source.name
    return f"{source.name} {','.join(files)} {source.revision}"


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
