"""Thumbs on answers and better answers, where the operator stores feedback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from ...conversation import Message
from ..feedback import TO_VISITORS, FeedbackStore
from ..uploads import shown_error
from .history import History, is_folded, parts_of, pictures_of, to_messages

OPTIONS = ("Like", "Dislike")  # gradio draws these two as thumbs
NO_ANSWER = "There is no such answer."
GONE = "The picture of this answer is gone from the server, so it cannot be rated."
THANKS = "Thank you. Your feedback is stored."


@dataclass(frozen=True)
class Thumbs:
    """What stands above the question box after a thumb down."""

    form: gr.Row
    better: gr.Textbox
    close: gr.Button
    rated: gr.State  # the messages up to the disliked answer; the browser has no part in it
    lit: gr.JSON  # index and name of the thumb that was stored last, for the browser


def build_thumbs() -> Thumbs:
    """Places the box for a better answer, and says what is stored."""
    with gr.Row(visible=False, elem_id="better") as form:
        better = gr.Textbox(
            label="A better answer", info="It teaches the model.", submit_btn="Store", max_lines=4, scale=1
        )
        close = gr.Button("Close", size="sm", scale=0, min_width=80)
    gr.Markdown(TO_VISITORS, elem_id="stored")
    return Thumbs(form, better, close, gr.State([]), gr.JSON(visible=False))


def rated_messages(history: History, index: Any) -> list[Message]:
    """The messages up to the answer at an index that a browser names.

    Raises:
        gr.Error: there is no answer, or a picture that it may be about is gone.
    """
    if not isinstance(index, int) or not 0 <= index < len(history):
        raise gr.Error(NO_ANSWER, print_exception=False)
    if history[index].get("role") != "assistant" or is_folded(history[index]):
        raise gr.Error(NO_ANSWER, print_exception=False)
    turns = history[: index + 1]
    files = sum(part.get("type") == "file" for turn in turns for part in parts_of(turn))
    if files > sum(len(pictures_of(turn)) for turn in turns):  # else it would be stored as a question about none
        raise gr.Error(GONE, print_exception=False)
    return to_messages(turns)


class ThumbsPage:
    """Event handlers of the thumbs.

    Args:
        admit: counts feedback against the rate limit of its address.
    """

    def __init__(self, store: FeedbackStore, admit: Callable[[gr.Request | None], None]):
        self._store, self._admit = store, admit

    def rate(self, history: History, event: gr.LikeData, request: gr.Request | None = None) -> tuple[Any, ...]:
        """Stores a thumb; a thumb down opens the box for a better answer."""
        if not isinstance(event.liked, bool):  # a thumb that was taken back
            return *close(), [event.index, None]
        messages = rated_messages(history, event.index)
        self._add(messages, event.liked, "", request)
        lit = [event.index, OPTIONS[0] if event.liked else OPTIONS[1]]
        return gr.Row(visible=not event.liked), "", [] if event.liked else messages, lit

    def correct(self, better: str, rated: list[Message], request: gr.Request | None = None) -> tuple[Any, Any, Any]:
        """Stores a better answer."""
        if not better.strip():
            raise gr.Error("Please type a better answer first.", print_exception=False)
        self._add(rated, False, better, request)
        return close()

    def _add(self, messages: list[Message], liked: bool, better: str, request: gr.Request | None) -> None:
        self._admit(request)
        try:
            self._store.add(messages, liked, better)
        except Exception as error:
            raise shown_error(error) from error
        gr.Info(THANKS)


def close() -> tuple[Any, Any, Any]:
    """Empties and hides the box for a better answer."""
    return gr.Row(visible=False), "", []


def connect_thumbs(page: ThumbsPage, chat: gr.Chatbot, thumbs: Thumbs, quick: dict[str, Any]) -> None:
    """Connects the thumbs; thumbs.js keeps them lit.

    Args:
        quick: options of events that show no progress.
    """
    form = [thumbs.form, thumbs.better, thumbs.rated]
    light = {"fn": None, "outputs": chat, **quick}
    chat.like(page.rate, chat, [*form, thumbs.lit], **quick).success(
        inputs=[chat, thumbs.lit], js="(history, lit) => mmchat.thumbs.rate(history, ...lit)", **light
    )
    chat.change(inputs=chat, js="history => mmchat.thumbs.show(history)", **light)
    thumbs.better.submit(page.correct, [thumbs.better, thumbs.rated], form, **quick)
    thumbs.close.click(close, None, form, queue=False, **quick)
