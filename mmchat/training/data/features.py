"""Picture features on disk: computed once, then read by every epoch of every run."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ...errors import BadInput
from ...media import FORMATS, open_image
from ...presets import ImageEncoderPreset

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
PICTURES_PER_SHARD = 512
MIRRORED = "mirrored/"  # before a picture's name: left and right exchanged
SUFFIXES = {".jpg", ".jpeg", ".tif"} | {f".{name.lower()}" for name in FORMATS}


def encoder_identity(preset: ImageEncoderPreset) -> dict[str, Any]:
    """What features depend on: the encoder, the revision of its weights, and how a picture is prepared for it."""
    return {
        "name": preset.name,
        "revision": preset.revision,
        "features": preset.feature_kind,
    }


class FeatureStore:
    """The features of a folder of pictures: shards of half-precision numbers, mapped into memory, and a manifest.

    ``store[name]`` is the features of a picture, [features, width]; ``name`` its path below the folder, with slashes.

    Raises:
        BadInput: the folder holds no feature store, or not all of one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder)
        self.encoder: dict[str, Any] = manifest["encoder"]
        self.pictures = Path(manifest["pictures"])  # where they lay when they were embedded
        self.unreadable: dict[str, str] = manifest["unreadable"]
        self._places: dict[str, tuple[np.ndarray, int]] = {}
        for shard in manifest["shards"]:
            try:
                features = np.load(self.folder / shard["file"], mmap_mode="r")
            except (OSError, ValueError) as error:
                raise BadInput(f"{shard['file']} in '{self.folder.name}' is missing or damaged; embed anew.") from error
            for row, name in enumerate(shard["pictures"]):
                self._places[name] = (features, row)  # of a picture embedded twice, the later shard holds

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> torch.Tensor:
        features, row = self._places[name]
        return torch.from_numpy(features[row].copy())  # [features, width]

    def check(self, preset: ImageEncoderPreset) -> None:
        """Raises BadInput if the features were made by another encoder, or in another way."""
        for key, expected in encoder_identity(preset).items():
            if self.encoder.get(key) != expected:
                raise BadInput(
                    f"The features in '{self.folder.name}' were made with {key} '{self.encoder.get(key)}', but "
                    f"{preset.name} as it is used here has '{expected}'. Run embed_images.py again."
                )


class PictureFolder:
    """Pictures encoded as they are asked for, in place of a FeatureStore; one picture costs what it costs."""

    def __init__(self, folder: str | Path, encoder: Any):
        self.pictures = Path(folder)
        self.encoder = encoder

    def __contains__(self, name: str) -> bool:
        return (self.pictures / name.removeprefix(MIRRORED)).is_file()

    def __getitem__(self, name: str) -> torch.Tensor:
        features = self.encoder.encode([read_picture(self.pictures, name)])[0]
        return features.half().cpu()  # rounded as a store rounds, so that both train to the same weights


def read_picture(folder: Path, name: str) -> Image.Image:
    """A picture by its name below a folder, mirrored if the name says so.

    Raises:
        BadInput: it cannot be read.
    """
    picture = open_image(folder / name.removeprefix(MIRRORED))
    return ImageOps.mirror(picture) if name.startswith(MIRRORED) else picture


@dataclass(frozen=True)
class EmbedReport:
    """What ``embed_folder`` did."""

    embedded: int
    kept: int  # embedded by an earlier run, and unchanged since
    unreadable: dict[str, str]  # name -> the reason


def embed_folder(
    pictures: str | Path,
    folder: str | Path,
    preset: ImageEncoderPreset,
    encoder: Any,
    *,
    batch_size: int = 16,
    mirror: bool = False,
    progress: Callable[[Iterator, int], Iterator] = lambda pictures, total: pictures,
) -> EmbedReport:
    """Computes the features of every picture below ``pictures`` and writes them to ``folder``.

    A shard is written under a temporary name and renamed before the manifest names it, so a run that was killed is
    gone on with, from its last whole shard.

    Args:
        encoder: as ``load_image_encoder(preset)`` gives it.
        batch_size: pictures that a GPU encodes at once; a CPU encodes each by itself, several side by side.
        mirror: embed every picture a second time, mirrored, under its name after ``MIRRORED``: more to learn from.
        progress: wraps the iterator of pictures, as tqdm does; called with it and the number of pictures.

    Raises:
        BadInput: there are no pictures, or the folder holds features of another encoder.
    """
    pictures, folder = Path(pictures), Path(folder)
    names = sorted(path.relative_to(pictures).as_posix() for path in _pictures_below(pictures))
    if not names:
        raise BadInput(f"There are no pictures in '{pictures.name}'.")
    if mirror:
        names += [MIRRORED + name for name in names]
    manifest = _start_manifest(folder, preset)
    manifest["pictures"] = str(pictures.resolve())
    known = {name: digest for shard in manifest["shards"] for name, digest in shard["pictures"].items()}
    device = next(encoder.parameters()).device
    batch_size = 1 if device.type == "cpu" else batch_size

    def embed(batch: list[str]) -> list[tuple[str, np.ndarray | str]]:
        """Each picture's name with its features, [features, width], or with the reason why it cannot be read."""
        found = {name: _pixels(pictures, name, encoder) for name in batch}
        readable = [name for name, pixels in found.items() if not isinstance(pixels, str)]
        if readable:
            stacked = torch.stack([found[name] for name in readable]).to(device)  # [batch, 3, height, width]
            found |= zip(readable, _features(encoder, stacked), strict=True)
        return list(found.items())

    with _workers(device) as pool:
        digests = dict(
            zip(names, pool.map(lambda name: _digest(pictures / name.removeprefix(MIRRORED)), names), strict=True)
        )
        waiting = [name for name in names if known.get(name) != digests[name]]
        writer = _ShardWriter(folder, manifest, digests)
        batches = [waiting[start : start + batch_size] for start in range(0, len(waiting), batch_size)]
        embedded = chain.from_iterable(_ahead(pool, embed, batches))
        for name, found in progress(embedded, len(waiting)):
            if isinstance(found, str):
                manifest["unreadable"][name] = found
            else:
                writer.add(name, found)
        writer.flush()
    unreadable = {name: reason for name, reason in manifest["unreadable"].items() if name in digests}
    return EmbedReport(writer.written, len(names) - len(waiting), unreadable)


def _pictures_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Through links to folders, too, unless they lead back to a folder on the way there (``above``)."""
    here = folder.resolve()
    if not here.is_dir() or here in above:
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from _pictures_below(path, (*above, here))
        elif path.suffix.lower() in SUFFIXES and path.is_file():
            yield path


@contextmanager
def _workers(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Threads that read, decode and encode pictures side by side.

    On a CPU each computes with one core: as many pictures at once as there are cores take half the time of one picture
    after another with all of them.
    """
    if device.type != "cpu":
        with ThreadPoolExecutor() as pool:
            yield pool
        return
    cores = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(cores, initializer=lambda: torch.set_num_threads(1)) as pool:
            yield pool
    finally:
        torch.set_num_threads(cores)


@torch.inference_mode()
def _features(encoder: Any, pixels: torch.Tensor) -> np.ndarray:
    return encoder(pixels).half().cpu().numpy()


def _ahead(pool: ThreadPoolExecutor, work: Callable, items: list, depth: int = 8) -> Iterator:
    """``map`` in other threads, at most ``depth`` items ahead, so that memory stays bounded."""
    futures = [pool.submit(work, item) for item in items[:depth]]
    for position in range(len(items)):
        result = futures.pop(0).result()
        if position + depth < len(items):
            futures.append(pool.submit(work, items[position + depth]))
        yield result


def _pixels(folder: Path, name: str, encoder: Any) -> torch.Tensor | str:
    """What the encoder reads, [3, height, width], or why there is nothing to read."""
    try:
        return encoder.pixels(read_picture(folder, name))
    except BadInput as error:
        return str(error)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _ShardWriter:
    """Gathers features until a shard is full."""

    def __init__(self, folder: Path, manifest: dict, digests: dict[str, str]):
        self.folder, self.manifest, self.digests = folder, manifest, digests
        self.names: list[str] = []
        self.arrays: list[np.ndarray] = []
        self.written = 0

    def add(self, name: str, features: np.ndarray) -> None:
        self.names.append(name)
        self.arrays.append(features)
        if len(self.names) >= PICTURES_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        """Writes what was gathered, and the manifest."""
        if self.names:
            file = f"features-{len(self.manifest['shards']):05d}.npy"
            unfinished = self.folder / f".{file}"
            with unfinished.open("wb") as sink:
                np.save(sink, np.stack(self.arrays))
            unfinished.replace(self.folder / file)
            self.manifest["shards"].append({"file": file, "pictures": {n: self.digests[n] for n in self.names}})
            self.written += len(self.names)
            self.names, self.arrays = [], []
        _write_manifest(self.folder, self.manifest)


def _start_manifest(folder: Path, preset: ImageEncoderPreset) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).exists():
        return {
            "format_version": FORMAT_VERSION,
            "encoder": encoder_identity(preset),
            "shards": [],
            "unreadable": {},
        }
    FeatureStore(folder).check(preset)
    return _read_manifest(folder)


def _read_manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"'{folder.name}' holds no features: embed_images.py writes them.") from error
    if manifest.get("format_version") != FORMAT_VERSION:
        raise BadInput(f"The features in '{folder.name}' are of a format this mmchat does not read; embed anew.")
    return manifest


def _write_manifest(folder: Path, manifest: dict) -> None:
    unfinished = folder / f".{MANIFEST}"
    unfinished.write_text(json.dumps(manifest, indent=1))
    unfinished.replace(folder / MANIFEST)
