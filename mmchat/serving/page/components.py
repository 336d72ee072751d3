"""Inputs that accept uploaded files only, whatever else a raw request may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ..bulk import is_zip
from ..uploads import MAX_FILE, MAX_ZIP, uploaded_file, uploaded_picture

MAX_NAME = 200  # characters of a file's name
File = tuple[str, str]  # path, name to show


class QuestionBox(gr.MultimodalTextbox):
    """A text box with pictures, which are decoded before a handler sees them."""

    is_template = True  # else the browser looks for a component with this class's name

    def preprocess(self, payload: Any) -> dict[str, Any]:
        """The text, and the paths of the pictures.

        Raises:
            gr.Error: a file was not uploaded, is too large, or is not a picture.
        """
        if payload is None:
            return {"text": "", "files": []}
        return {"text": payload.text or "", "files": [uploaded_picture(file.path) for file in payload.files]}


class Conversation(gr.Chatbot):
    """A conversation of texts and pictures.

    A message can hold any component of gradio, which the server would create as the browser asks; none is needed here.
    """

    is_template = True

    def preprocess(self, payload: Any) -> list[dict[str, Any]]:
        """The messages, without parts that are neither texts nor files."""
        if payload is None:
            return []
        for message in payload.root:
            message.content = [part for part in message.content if part.type in ("text", "file")]
        return super().preprocess(payload)


class PictureFiles(gr.File):
    """A file input that takes uploads, and nothing else that a raw request may name."""

    is_template = True  # else the browser looks for a component with this class's name

    def preprocess(self, payload: Any) -> list[File]:
        """The uploaded files.

        Raises:
            gr.Error: a file was not uploaded, or is too large.
        """
        if payload is None:
            return []
        files = []
        for file in payload.root if hasattr(payload, "root") else [payload]:
            path = uploaded_file(file.path, MAX_ZIP if is_zip(file.path) else MAX_FILE)
            files.append((str(path), Path(file.orig_name or path.name).name[-MAX_NAME:]))
        return files
