"""Decodes uploaded pictures and recordings, including damaged and huge ones. Imports no torch."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from .conversation import ImageSource
from .errors import BadInput

logger = logging.getLogger(__name__)

MAX_PIXELS = 40_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SAMPLE_RATE = 16_000  # Hz, as Whisper expects
MAX_SECONDS = 600  # longest recording


def decode_image(source: ImageSource | BinaryIO) -> Image.Image:
    """Decodes a picture to RGB, see ``to_rgb``.

    Args:
        source: a path, a file object, or a decoded PIL image.

    Raises:
        BadInput: the picture cannot be read.
    """
    return to_rgb(source) if isinstance(source, Image.Image) else open_image(source)


def open_image(source: str | Path | BinaryIO) -> Image.Image:
    """Decodes a picture file to RGB, see ``to_rgb``.

    Raises:
        BadInput: the file is not a picture, is damaged, or has more than ``MAX_PIXELS`` pixels.
    """
    too_large = BadInput(f"That picture is too large. Please send one of at most {MAX_PIXELS / 1e6:.0f} megapixels.")
    try:
        with Image.open(source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:  # known from the header; decoding would fill the memory
                raise too_large
            image.load()
            return to_rgb(image)
    except BadInput:
        raise
    except FileNotFoundError as error:
        raise BadInput(f"There is no picture '{Path(str(source)).name}'.") from error
    except Image.DecompressionBombError as error:
        raise too_large from error
    except Exception as error:  # on damaged files decoders raise almost anything
        raise BadInput("That file is not a picture I can read. Please send a JPEG, PNG or WebP.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a decoded picture to RGB: upright (EXIF orientation), transparency on white."""
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # the picture is usable without its EXIF data
        logger.info("Unreadable EXIF data: %s", error)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float32)
        image = Image.fromarray((values / max(values.max(), 1.0) * 255).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def picture_digest(source: ImageSource) -> str:
    """Digest of a picture's content; a path may hold another picture tomorrow.

    Args:
        source: a path or a decoded PIL image.

    Raises:
        BadInput: there is no such file.
    """
    if isinstance(source, Image.Image):
        content = repr((source.mode, source.size)).encode() + source.tobytes()
    else:
        try:
            content = Path(source).read_bytes()
        except OSError as error:
            raise BadInput(f"There is no picture '{Path(source).name}'.") from error
    return hashlib.blake2b(content).hexdigest()


def read_audio(path: str | Path) -> np.ndarray:
    """Decodes any audio or video file that PyAV reads to 16 kHz mono float32 samples in −1 to 1.

    Raises:
        BadInput: the file is missing, holds no sound, is damaged, or is too long.
    """
    from av.error import FFmpegError

    try:
        blocks = list(_limit_length(decode_audio(path)))
    except FileNotFoundError as error:
        raise BadInput(f"There is no recording '{Path(path).name}'.") from error
    except (FFmpegError, IndexError, ValueError, OSError) as error:
        raise BadInput("That file is not a recording I can read. Please send WAV, MP3, FLAC, OGG or WebM.") from error
    return np.concatenate([np.zeros(0, np.int16), *blocks]).astype(np.float32) / (1 << 15)


def decode_audio(path: str | Path) -> Iterator[np.ndarray]:
    """Yields blocks of 16 kHz mono 16-bit samples."""
    import av

    resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
    with av.open(str(path), metadata_errors="ignore") as container:
        frames = container.decode(audio=0)
        while True:
            try:
                frame = next(frames, None)  # None at the end flushes the resampler
            except av.error.InvalidDataError:
                continue  # skip a damaged packet, keep the rest
            if frame:
                frame.pts = None  # timestamps of browser recordings may jump
            for part in resampler.resample(frame):
                yield part.to_ndarray()[0]
            if frame is None:
                return


def _limit_length(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Stops a recording at MAX_SECONDS: a small file may hold days of silence, which would fill the memory."""
    length = 0
    for block in blocks:
        length += len(block)
        if length > MAX_SECONDS * SAMPLE_RATE:
            raise BadInput(f"That recording is too long. Please send at most {MAX_SECONDS // 60} minutes.")
        yield block
