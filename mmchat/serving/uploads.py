"""What visitors send: pictures of theirs are taken, other files of the server are not; what they read if one is bad."""

from __future__ import annotations

import logging
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder

from ..errors import BadInput, MmchatError
from ..media import open_image

logger = logging.getLogger(__name__)

MAX_UPLOAD = "10mb"
KEEP_UPLOADS = 3600  # seconds


def shown_error(error: Exception) -> gr.Error:
    """What a person reads when something went wrong: our own sentence, never a stack trace."""
    if isinstance(error, MmchatError):
        return gr.Error(str(error), print_exception=False)
    logger.exception("A request failed", exc_info=error)
    return gr.Error("Something went wrong on my side. Please try again.", print_exception=False)


class SafeImage(gr.Image):
    """An image input that hands over uploaded pictures only.

    gr.Image takes any path of the server from a raw request that leaves out ``meta``, and passes damaged files on.
    """

    is_template = True  # or the browser would look for a component of this class's name

    def preprocess(self, payload):
        if payload is None:
            return None
        path = Path(payload.path or "").resolve()
        if not is_uploaded(path):
            raise gr.Error("I do not know that picture. Please upload it.", print_exception=False)
        try:
            open_image(path)
        except BadInput as error:
            raise shown_error(error) from error
        return str(path)


def is_uploaded(path: Path) -> bool:
    """Whether a file lies where uploads go; the path has to be resolved."""
    return path.is_relative_to(Path(get_upload_folder()).resolve())
