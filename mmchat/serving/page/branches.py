"""Other answers to the last question, to flip between, and earlier questions, to ask another way.

The answers that a retry replaces travel with the conversation, in the options of its last message, which gradio shows
as buttons. They come back from the browser, so only their texts are trusted.
"""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from .conversations import with_id
from .history import EMPTY_BOX, Box, History, Turn, is_folded, text_of, to_box
from .visit import Visit

MAX_ANSWERS = 8  # kept for one question; the oldest is dropped
MAX_OPTION = 500_000  # characters
Answer = list[Turn]  # what stands between two questions: details and a draft, folded, and the answer


def plain(answer: Any) -> Answer:
    """An answer reduced to its texts and titles."""
    kept = []
    for turn in answer:
        made: Turn = {"role": "assistant", "content": str(text_of(turn))}
        if is_folded(turn):
            given = {name: turn["metadata"].get(name) for name in ("title", "log")}
            made["metadata"] = {"status": "done", **{name: str(value) for name, value in given.items() if value}}
            if isinstance(seconds := turn["metadata"].get("duration"), (int, float)):
                made["metadata"]["duration"] = seconds
        kept.append(made)
    return kept


def with_answers(answers: list[Answer], shown: int) -> Answer:
    """The messages of one of several answers; its options are buttons that lead to the others."""
    *before, last = answers[shown]
    if len(answers) < 2:
        return [*before, last]

    def option(to: int, label: str) -> dict[str, str]:
        return {"label": label, "value": json.dumps({"shown": shown, "to": to, "answers": answers})}

    back = [option(shown - 1, f"‹ Show answer {shown} of {len(answers)}")] if shown else []
    on = [option(shown + 1, f"Show answer {shown + 2} of {len(answers)} ›")] if shown < len(answers) - 1 else []
    return [*before, {**last, "options": [*back, *on]}]


def answers_of(answer: History) -> list[Answer]:
    """Every answer to a question, from the messages of the one that is shown, which is the last of the list."""
    if not answer:
        return []
    options = answer[-1].get("options") or []
    read = _read_option(options[0].get("value")) if options else None
    if not read:
        return [plain(answer)]
    answers, shown, _ = read
    return [*answers[:shown], *answers[shown + 1 :], answers[shown]][-MAX_ANSWERS:]


def _read_option(value: Any) -> tuple[list[Answer], int, int] | None:
    """All answers, which is shown, and which the option leads to; None if a browser made it up."""
    try:
        if not isinstance(value, str) or len(value) > MAX_OPTION:
            return None
        given = json.loads(value)
        answers = [plain(answer) for answer in given["answers"][: MAX_ANSWERS + 1]]
        shown, to = int(given["shown"]), int(given["to"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    if not all(answers) or not (0 <= shown < len(answers) and 0 <= to < len(answers)):
        return None
    return answers, shown, to


def split(history: History) -> tuple[History, History]:
    """The conversation up to its last question, and the answer to it."""
    ends = [index for index, turn in enumerate(history, start=1) if turn.get("role") == "user"]
    cut = ends[-1] if ends else 0
    return history[:cut], history[cut:]


def flip(history: History, visit: Visit, event: gr.SelectData) -> Any:
    """Shows another answer to the last question."""
    read = _read_option(event.value)
    asked, answer = split(history)
    if not read or not answer:
        return gr.skip()
    visit.request()
    answers, _, to = read
    return [*asked, *with_answers(answers, to)]


def edit(history: History, visit: Visit, event: gr.EventData) -> tuple[History, Box]:
    """Moves an earlier question back into the box; the next question starts a new conversation from there.

    The browser keeps the old conversation under its own id.

    Args:
        event: ``nth`` counts the rows of questions; each picture and each text is a row.
    """
    nth = getattr(event, "nth", None)
    rows = [index for index, turn in enumerate(history) if turn.get("role") == "user" for _ in turn["content"]]
    if not isinstance(nth, int) or not 0 <= nth < len(rows):
        return history, EMPTY_BOX
    visit.request()
    at = rows[nth]
    return with_id(history[:at]) if at else [], to_box(history[at : at + 1])
