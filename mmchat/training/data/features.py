"""Image features on disk, computed once and read by every epoch of every run."""

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
MIRRORED = "mirrored/"  # prefix of a picture's name: flipped left to right
SUFFIXES = {".jpg", ".jpeg", ".tif"} | {f".{name.lower()}" for name in FORMATS}


def encoder_fingerprint(preset: ImageEncoderPreset) -> dict[str, Any]:
    """What features depend on: the encoder, the revision of its weights, and the kind of features."""
    return {
        "name": preset.name,
        "revision": preset.revision,
        "features": preset.feature_kind,
    }


class FeatureStore:
    """The features of a folder of pictures: memory-mapped fp16 shards and a manifest.

    ``store[name]`` returns the features of a picture, [features, image_dim]. A name is the path below the folder, with
    slashes.

    Raises:
        BadInput: the folder holds no feature store, or an incomplete one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder)
        self.encoder: dict[str, Any] = manifest["encoder"]
        self.pictures = Path(manifest["pictures"])  # the folder of the pictures when they were embedded
        self.unreadable: dict[str, str] = manifest["unreadable"]
        self._rows: dict[str, tuple[np.ndarray, int]] = {}
        for shard in manifest["shards"]:
            try:
                features = np.load(self.folder / shard["file"], mmap_mode="r")
            except (OSError, ValueError) as error:
                raise BadInput(
                    f"{shard['file']} in '{self.folder.name}' is missing or damaged: delete the folder and run "
                    "embed_images.py again."
                ) from error
            for row, name in enumerate(shard["pictures"]):
                self._rows[name] = (features, row)  # later shards replace earlier versions of a picture

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def __getitem__(self, name: str) -> torch.Tensor:
        features, row = self._rows[name]
        return torch.from_numpy(features[row].copy())  # [features, image_dim]

    def check(self, preset: ImageEncoderPreset) -> None:
        """Raises BadInput if the features come from another encoder, revision or kind of features."""
        for key, expected in encoder_fingerprint(preset).items():
            if self.encoder.get(key) != expected:
                raise BadInput(
                    f"The features in '{self.folder.name}' were made with {key} '{self.encoder.get(key)}', but "
                    f"{preset.name} here has '{expected}': delete the folder and run embed_images.py again."
                )


class PictureFolder:
    """Encodes pictures on demand; the slower alternative to a FeatureStore."""

    def __init__(self, folder: str | Path, encoder: Any):
        self.pictures = Path(folder)
        self.encoder = encoder

    def __contains__(self, name: str) -> bool:
        return (self.pictures / name.removeprefix(MIRRORED)).is_file()

    def __getitem__(self, name: str) -> torch.Tensor:
        features = self.encoder.encode([read_picture(self.pictures, name)])[0]
        return features.half().cpu()  # fp16, like a FeatureStore, so both train the same weights


def read_picture(folder: Path, name: str) -> Image.Image:
    """Opens a picture by its name below a folder; the prefix MIRRORED flips it.

    Raises:
        BadInput: the picture is unreadable.
    """
    picture = open_image(folder / name.removeprefix(MIRRORED))
    return ImageOps.mirror(picture) if name.startswith(MIRRORED) else picture


@dataclass(frozen=True)
class EmbedReport:
    """The result of ``embed_folder``."""

    embedded: int
    kept: int  # embedded by an earlier run and unchanged since
    unreadable: dict[str, str]  # name → reason


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

    If interrupted, it resumes after the last complete shard: a shard is written under a temporary name and renamed
    before the manifest lists it.

    Args:
        encoder: from ``load_image_encoder(preset)``.
        batch_size: pictures per batch on a GPU; a CPU encodes single pictures in parallel.
        mirror: also embed every picture flipped, as data augmentation, under the prefix ``MIRRORED``.
        progress: wraps the iterator of pictures, like tqdm; called with the iterator and the number of pictures.

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
        """Each picture's name with its features, [features, image_dim], or the reason why it is unreadable."""
        found = {name: _pixels(pictures, name, encoder) for name in batch}
        readable = [name for name, pixels in found.items() if not isinstance(pixels, str)]
        if readable:
            features = encoder.features([found[name] for name in readable])  # [batch, features, image_dim]
            found |= zip(readable, features.half().cpu().numpy(), strict=True)
        return list(found.items())

    with _workers(device) as pool:
        digests = dict(
            zip(names, pool.map(lambda name: _digest(pictures / name.removeprefix(MIRRORED)), names), strict=True)
        )
        pending = [name for name in names if known.get(name) != digests[name]]
        writer = _ShardWriter(folder, manifest, digests)
        batches = [pending[start : start + batch_size] for start in range(0, len(pending), batch_size)]
        embedded = chain.from_iterable(_prefetched(pool, embed, batches))
        for name, found in progress(embedded, len(pending)):
            if isinstance(found, str):
                manifest["unreadable"][name] = found
            else:
                writer.add(name, found)
        writer.flush()
    unreadable = {name: reason for name, reason in manifest["unreadable"].items() if name in digests}
    return EmbedReport(writer.written, len(names) - len(pending), unreadable)


def _pictures_below(folder: Path, parents: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Walks a folder and follows links, except those back to one of its ``parents``."""
    resolved = folder.resolve()
    if not resolved.is_dir() or resolved in parents:
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from _pictures_below(path, (*parents, resolved))
        elif path.suffix.lower() in SUFFIXES and path.is_file():
            yield path


@contextmanager
def _workers(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that read, decode and encode pictures.

    On a CPU each thread uses one core: one picture per core takes half the time of one picture after another on all
    cores.
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


def _prefetched(pool: ThreadPoolExecutor, work: Callable, items: list, depth: int = 8) -> Iterator:
    """Maps in other threads, at most ``depth`` items ahead, to bound memory."""
    futures = [pool.submit(work, item) for item in items[:depth]]
    for position in range(len(items)):
        result = futures.pop(0).result()
        if position + depth < len(items):
            futures.append(pool.submit(work, items[position + depth]))
        yield result


def _pixels(folder: Path, name: str, encoder: Any) -> torch.Tensor | str:
    """The encoder's input, [3, height, width], or the reason why the picture is unreadable."""
    try:
        return encoder.preprocess(read_picture(folder, name))
    except BadInput as error:
        return str(error)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _ShardWriter:
    """Buffers features and writes them in shards."""

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
        """Writes the buffered features and the manifest."""
        if self.names:
            file = f"features-{len(self.manifest['shards']):05d}.npy"
            temporary = self.folder / f".{file}"
            with temporary.open("wb") as sink:
                np.save(sink, np.stack(self.arrays))
            temporary.replace(self.folder / file)
            self.manifest["shards"].append({"file": file, "pictures": {n: self.digests[n] for n in self.names}})
            self.written += len(self.names)
            self.names, self.arrays = [], []
        _write_manifest(self.folder, self.manifest)


def _start_manifest(folder: Path, preset: ImageEncoderPreset) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).exists():
        return {
            "format_version": FORMAT_VERSION,
            "encoder": encoder_fingerprint(preset),
            "shards": [],
            "unreadable": {},
        }
    FeatureStore(folder).check(preset)
    return _read_manifest(folder)


def _read_manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"'{folder.name}' holds no features: write them with embed_images.py.") from error
    if manifest.get("format_version") != FORMAT_VERSION:
        raise BadInput(
            f"The features in '{folder.name}' have a format that this version cannot read: delete the folder and run "
            "embed_images.py again."
        )
    return manifest


def _write_manifest(folder: Path, manifest: dict) -> None:
    temporary = folder / f".{MANIFEST}"
    temporary.write_text(json.dumps(manifest, indent=1))
    temporary.replace(folder / MANIFEST)
