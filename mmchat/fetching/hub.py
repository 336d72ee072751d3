"""Downloads from the Hugging Face Hub: fetched once, then read from disk without a network."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from ..errors import AssetError
from .cache import cache_folder, is_complete
from .progress import expect_repository
from .sources import HubRepository

logger = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
SMALL_FILES = (".json", ".txt", ".model", ".jinja")
WITHOUT_HUB = "The preset 'smol' works without the Hub: --preset smol, or MMCHAT_PRESET=smol."


def fetch_repository(repository: HubRepository, files: Sequence[str] | None = None) -> Path:
    """Returns the folder with a repository's weights, tokenizer and config.

    A complete download is never checked again, so the next start needs no network.

    Args:
        repository: a repository, or a local folder as its name, which is returned unchanged.
        files: the files to fetch instead of those that transformers reads.

    Raises:
        AssetError: the repository is not available; the message says why and what to do.
    """
    if Path(repository.name).is_dir():
        return Path(repository.name)
    return _downloaded(record_path(repository)) or _download(repository, files)


def is_repository_here(repository: HubRepository) -> bool:
    """Whether the repository is on this machine."""
    return Path(repository.name).is_dir() or _downloaded(record_path(repository)) is not None


def can_fetch(repository: HubRepository) -> bool:
    """Whether the repository is on this machine, or available on the Hub."""
    return is_repository_here(repository) or files_on_hub(repository) is not None


def files_on_hub(repository: HubRepository) -> list[str] | None:
    """The files on the Hub that transformers reads; None if the repository is not available now."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repository.name, revision=repository.revision, timeout=5)
    except Exception as error:  # any error means that it is not available now
        logger.debug("%s", repository.name, exc_info=error)
        return None
    return _needed([sibling.rfilename for sibling in info.siblings or []])


def record_path(repository: HubRepository) -> Path:
    """The file that records a download: its folder, and the size of each file."""
    return cache_folder() / "hub" / f"{repository.name.replace('/', '--')}@{repository.revision}.json"


def _downloaded(record: Path) -> Path | None:
    """The folder of an earlier download, if all its files are still complete."""
    try:
        content = json.loads(record.read_text())
        folder, sizes = Path(content["folder"]), content["files"]
    except (OSError, ValueError, KeyError):
        return None
    return folder if all(is_complete(folder / name, size) for name, size in sizes.items()) else None


def _download(repository: HubRepository, files: Sequence[str] | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    name = repository.name
    if repository.is_missing_folder:
        raise AssetError(f"There is no folder '{Path(name).name}', and a model on the Hub is named as owner/model.")
    logger.info("Fetching %s from the Hugging Face Hub; this happens once", name)
    try:
        info = HfApi().model_info(name, revision=repository.revision, files_metadata=True)
    except Exception as error:
        raise _explained(repository, error) from error
    available = [sibling.rfilename for sibling in info.siblings or []]
    files = files or _needed(available)
    missing = [file for file in files if file not in available]
    if missing or not any(file.endswith(WEIGHTS) for file in files):
        raise AssetError(
            f"{name} on the Hub lacks {missing[0] if missing else 'weights in a known format'}. Name another."
        )
    expect_repository(repository, sum(sibling.size or 0 for sibling in info.siblings if sibling.rfilename in files))
    try:
        folder = Path(snapshot_download(name, revision=info.sha, allow_patterns=files))
        sizes = {file: (folder / file).stat().st_size for file in files}
    except Exception as error:
        raise _explained(repository, error) from error
    record = record_path(repository)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"folder": str(folder), "files": sizes}, indent=1))
    return folder


def _needed(files: list[str]) -> list[str]:
    """Config, tokenizer and weights in the root of a repository; pickled weights only if there is no safetensors file.

    transformers loads pickles with ``weights_only=True``.
    """
    top = [file for file in files if "/" not in file]
    weights = [file for file in top if file.endswith(".safetensors")]
    weights = weights or [file for file in top if file.startswith(("pytorch_model", "model")) and file.endswith(".bin")]
    return weights + [file for file in top if file.endswith(SMALL_FILES)]


def _explained(repository: HubRepository, error: Exception) -> AssetError:
    """An error of the Hub's client as a sentence: what is wrong and what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    logger.debug("%s", repository.name, exc_info=error)
    name = repository.name
    if isinstance(error, GatedRepoError):
        return AssetError(
            f"{name} is gated: request access at https://huggingface.co/{name}, then log in with 'hf auth login' or "
            "set HF_TOKEN."
        )
    if isinstance(error, RepositoryNotFoundError):
        return AssetError(f"The Hub has no model '{name}' that you can access. Check the name, or set HF_TOKEN.")
    if isinstance(error, RevisionNotFoundError):
        return AssetError(f"{name} has no revision '{repository.revision}' on the Hub. Check the revision.")
    return AssetError(
        f"{name} could not be fetched from the Hugging Face Hub ({_reason(error)}). Try again to resume the download. "
        f"{WITHOUT_HUB}"
    )


def _reason(error: Exception) -> str:
    """What went wrong in a few words, without addresses or paths."""
    kind = type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status:
        return f"it answered with error {status}"
    if "Timeout" in kind:
        return "it did not answer in time"
    if "Connect" in kind or isinstance(error, ConnectionError):
        return "it cannot be reached"
    return getattr(error, "strerror", None) or "the download was interrupted"
