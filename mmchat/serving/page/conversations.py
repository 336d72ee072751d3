"""Conversations in the visitor's browser: the list of them in the sidebar.

store.js keeps them, transfer.js exports and imports them. The server sees a conversation only while it answers
a question in it, and keeps none.
"""

from __future__ import annotations

import uuid

import gradio as gr

from .assets import asset
from .history import History, Turn

TEMPLATE = """<input type="search" placeholder="Search" aria-label="Search conversations">
<ul aria-label="Conversations"></ul>
<p role="status"></p>
<button class="import">Import a conversation</button>
<input type="file" accept=".json,.md" hidden aria-label="A conversation to import">"""

NOTICES = {
    "not_kept": "Your browser could not keep a copy of a picture. It lasts for an hour.",
    "full": "Your browser's storage is full: this conversation is not saved. Delete some, or export it.",
    "nothing_kept": "Your browser keeps nothing for this page: a reload loses this conversation. Export it to keep it.",
    "lost": "A picture of this conversation is gone: the server's copy was deleted, and your browser has none.",
    "not_sent": "A picture of this conversation could not be sent to the server again, so an answer cannot see it now. "
    "Your next question tries again.",
    "nothing_to_save": "There is nothing to save yet: this conversation is empty.",
    "refused": "That file is not a conversation that was exported here.",
}


def build_list() -> gr.HTML:
    """Places the list; it triggers the events ``open`` and ``notice``."""
    return gr.HTML(elem_id="list", apply_default_css=False, html_template=TEMPLATE, js_on_load=asset("list.js"))


def show_notice(event: gr.EventData) -> None:
    """Says what happened in the browser; the browser names one of our sentences."""
    sentence = NOTICES.get(str(getattr(event, "reason", "")))
    if sentence:
        gr.Warning(sentence)


def with_id(history: History) -> History:
    """The conversation with a new id, under which the browser keeps it, in its first message."""
    first: Turn = {**history[0], "metadata": {**(history[0].get("metadata") or {}), "id": uuid.uuid4().hex}}
    return [first, *history[1:]]


def id_of(history: History) -> str | None:
    """The id of a conversation, if it has one."""
    return (history[0].get("metadata") or {}).get("id")
