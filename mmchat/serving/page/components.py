"""Inputs that accept what was uploaded, and nothing else that a raw request may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ...errors import BadInput
from ...media import open_image
from ..uploads import is_uploaded, shown_error


class QuestionBox(gr.MultimodalTextbox):
    """A text box with pictures, which are decoded before a handler sees them."""

    is_template = True  # else the browser looks for a component with this class's name

    def preprocess(self, payload: Any) -> dict[str, Any]:
        """The text, and the paths of the pictures.

        Raises:
            gr.Error: a file was not uploaded, or is not a picture.
        """
        if payload is None:
            return {"text": "", "files": []}
        paths = [Path(file.path or "").resolve() for file in payload.files]
        for path in paths:
            if not is_uploaded(path):
                raise gr.Error("That picture was not uploaded here. Please upload it.", print_exception=False)
            try:
                open_image(path)
            except BadInput as error:
                raise shown_error(error) from error
        return {"text": payload.text or "", "files": [str(path) for path in paths]}


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
