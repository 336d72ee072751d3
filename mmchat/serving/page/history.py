"""The page's conversation, as gradio's Chatbot holds it, and the engine's messages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...conversation import Message
from ..uploads import is_uploaded

Turn = dict[str, Any]  # {"role", "content", "metadata"}: one message of the Chatbot, a question or an answer
History = list[Turn]
Box = dict[str, Any]  # {"text", "files"}: what is in the question box
EMPTY_BOX: Box = {"text": "", "files": []}
DRAFT = "Draft"  # title of an answer that was rewritten; the page folds it, and the model does not see it again


def is_folded(turn: Turn) -> bool:
    """Whether a message has a title: the page folds it, and it is no part of what was said."""
    return bool((turn.get("metadata") or {}).get("title"))


def parts_of(turn: Turn) -> list[dict[str, Any]]:
    """The texts and files of a message, in their order."""
    content = turn["content"]
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def text_of(turn: Turn) -> str:
    """What a message says."""
    return "\n".join(part["text"] for part in parts_of(turn) if part.get("type") == "text")


def pictures_of(turn: Turn) -> list[Path]:
    """The pictures of a message that are uploads and still there."""
    files = [Path(part["file"]["path"]) for part in parts_of(turn) if part.get("type") == "file"]
    return [path for path in files if is_uploaded(path.resolve()) and path.is_file()]


def to_messages(history: History) -> list[Message]:
    """Converts the page's conversation to messages.

    The browser sends it, so unknown roles and parts are dropped, as are files that are not uploads. What the page folds
    (drafts, details) and deleted pictures are dropped, too.
    """
    return [
        Message(turn["role"], text_of(turn), pictures_of(turn))
        for turn in history
        if turn.get("role") in ("user", "assistant") and not is_folded(turn)
    ]


def user_turn(text: str, pictures: Sequence[str]) -> Turn:
    """A question as the page shows it: the numbered pictures above the text."""
    shown = [{"path": path, "alt_text": f"Picture {number}"} for number, path in enumerate(pictures, start=1)]
    return {"role": "user", "content": [*shown, *([text] if text else [])]}


def said(text: str) -> Turn:
    """An answer as the page shows it."""
    return {"role": "assistant", "content": text}


def to_box(turns: History) -> Box:
    """A question as the box holds it; an empty box if there is none."""
    question = next((turn for turn in turns if turn.get("role") == "user"), None)
    if not question:
        return EMPTY_BOX
    return {"text": text_of(question), "files": [str(path) for path in pictures_of(question)]}
