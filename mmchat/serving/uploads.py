"""Uploads: accepts uploaded pictures only, no other file of the server, and turns errors into sentences."""

from __future__ import annotations

import logging
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder

from ..errors import BadInput, MmchatError
from ..media import MAX_SECONDS, open_image

logger = logging.getLogger(__name__)

MAX_RECORDING = MAX_SECONDS * 48_000 * 2 * 2 + 1000  # bytes: as WAV of 48 kHz, stereo, 16 bits, with its header
MAX_FILE, MAX_ZIP = 10 << 20, 100 << 20  # bytes: a picture, and a ZIP of them
KEEP_UPLOADS = 3600  # seconds


def shown_error(error: Exception) -> gr.Error:
    """The error that a visitor sees: a sentence, never a stack trace."""
    if isinstance(error, MmchatError):
        return gr.Error(str(error), print_exception=False)
    logger.exception("A request failed", exc_info=error)
    return gr.Error("Something went wrong on my side. Please try again.", print_exception=False)


class SafeImage(gr.Image):
    """An image input that accepts uploaded pictures only.

    From a raw request without ``meta``, gr.Image accepts any path of the server, and it passes damaged files on.
    """

    is_template = True  # else the browser looks for a component with this class's name

    def preprocess(self, payload):
        return None if payload is None else uploaded_picture(payload.path)


def uploaded_picture(path: str | None) -> str:
    """The path of an uploaded picture, resolved, once the picture was decoded.

    Raises:
        gr.Error: the file was not uploaded, is too large, or is not a picture.
    """
    resolved = uploaded_file(path)
    try:
        open_image(resolved)
    except BadInput as error:
        raise shown_error(error) from error
    return str(resolved)


def uploaded_file(path: str | None, limit: int = MAX_FILE) -> Path:
    """The path of an uploaded file, resolved. The server takes larger uploads, for the sake of recordings.

    Args:
        limit: bytes.

    Raises:
        gr.Error: the file was not uploaded, or is too large.
    """
    resolved = Path(path or "").resolve()
    if not is_uploaded(resolved) or not resolved.is_file():
        raise gr.Error("That file was not uploaded here. Please upload it.", print_exception=False)
    if resolved.stat().st_size > limit:
        raise gr.Error(
            f"'{resolved.name}' is larger than {limit >> 20} MB. Please send a smaller one.",
            print_exception=False,
        )
    return resolved


def is_uploaded(path: Path) -> bool:
    """Whether a resolved path is inside the upload folder."""
    return path.is_relative_to(Path(get_upload_folder()).resolve())
