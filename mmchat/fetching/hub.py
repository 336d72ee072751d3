"""Weights on the Hugging Face Hub: fetched once, then found on disk, with or without a network."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from ..errors import AssetError
from .cache import cache_folder
from .sources import HubRepository

logger = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
SMALL_FILES = (".json", ".txt", ".model", ".jinja")
WITHOUT_HUB = "The preset 'smol' needs no Hub: MMCHAT_PRESET=smol, or --preset smol."


def fetch_repository(repository: HubRepository, files: Sequence[str] | None = None) -> Path:
    """The folder with a repository's weights, tokenizer and configuration.

    What was fetched completely is not asked for again, so the next start needs no network.

    Args:
        repository: whose name may also be a folder on disk, which is taken as it is.
        files: what to fetch in place of what transformers reads.

    Raises:
        AssetError: it cannot be had; the sentence says why and what to do.
    """
    if Path(repository.name).is_dir():
        return Path(repository.name)
    return _noted(_note(repository)) or _download(repository, files)


def is_repository_here(repository: HubRepository) -> bool:
    """Whether it has been fetched."""
    return Path(repository.name).is_dir() or _noted(_note(repository)) is not None


def can_fetch(repository: HubRepository) -> bool:
    """Whether it is here already, or the Hub answers that it is there."""
    if is_repository_here(repository):
        return True
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(repository.name, revision=repository.revision, timeout=5)
    except Exception as error:  # whatever is wrong, it cannot be had now
        logger.debug("%s", repository.name, exc_info=error)
        return False
    return True


def _note(repository: HubRepository) -> Path:
    """The file that tells what was fetched, and where it lies."""
    return cache_folder() / "hub" / f"{repository.name.replace('/', '--')}@{repository.revision}.json"


def _noted(note: Path) -> Path | None:
    """The folder of an earlier download, if every file of it is still there and whole."""
    try:
        content = json.loads(note.read_text())
        folder, sizes = Path(content["folder"]), content["files"]
    except (OSError, ValueError, KeyError):
        return None
    is_whole = all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())
    return folder if is_whole else None


def _download(repository: HubRepository, files: Sequence[str] | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    name = repository.name
    logger.info("Fetching %s from the Hugging Face Hub; it is kept for the next start", name)
    try:
        info = HfApi().model_info(name, revision=repository.revision)
    except Exception as error:
        raise _in_words(repository, error) from error
    there = [sibling.rfilename for sibling in info.siblings or []]
    files = files or _wanted(there)
    missing = [file for file in files if file not in there]
    if missing or not any(file.endswith(WEIGHTS) for file in files):
        raise AssetError(f"{name} on the Hub lacks {missing[0] if missing else 'weights that I can read'}.")
    try:
        folder = Path(snapshot_download(name, revision=info.sha, allow_patterns=files))
        sizes = {file: (folder / file).stat().st_size for file in files}
    except Exception as error:
        raise _in_words(repository, error) from error
    note = _note(repository)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"folder": str(folder), "files": sizes}, indent=1))
    return folder


def _wanted(files: list[str]) -> list[str]:
    """Configuration, tokenizer and weights at the top of a repository; pickled weights only where there are no others.

    transformers reads those with ``weights_only=True``.
    """
    top = [file for file in files if "/" not in file]
    weights = [file for file in top if file.endswith(".safetensors")]
    weights = weights or [file for file in top if file.startswith(("pytorch_model", "model")) and file.endswith(".bin")]
    return weights + [file for file in top if file.endswith(SMALL_FILES)]


def _in_words(repository: HubRepository, error: Exception) -> AssetError:
    """What went wrong, and what to do; the Hub's client raises errors of several libraries."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    logger.debug("%s", repository.name, exc_info=error)
    name = repository.name
    if isinstance(error, GatedRepoError):
        return AssetError(
            f"{name} is gated: ask for access at https://huggingface.co/{name}, then log in with 'hf auth login' or "
            "set HF_TOKEN."
        )
    if isinstance(error, RepositoryNotFoundError):
        return AssetError(f"The Hub has no model '{name}' that you may read. Check the name, or set HF_TOKEN.")
    if isinstance(error, RevisionNotFoundError):
        return AssetError(f"{name} has no revision '{repository.revision}' on the Hub.")
    return AssetError(
        f"{name} could not be fetched from the Hugging Face Hub ({_reason(error)}). Start again to go on where it "
        f"stopped. {WITHOUT_HUB}"
    )


def _reason(error: Exception) -> str:
    """A few words on what went wrong, without addresses or paths."""
    kind = type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status:
        return f"it answered with error {status}"
    if "Timeout" in kind:
        return "it did not answer in time"
    if "Connect" in kind or isinstance(error, ConnectionError):
        return "it cannot be reached"
    return getattr(error, "strerror", None) or "the transfer broke off"
