"""One turn of a conversation: ask, answer, retry, undo, stop."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from threading import Lock
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

from ...conversation import MAX_QUESTION, Engine, Message, SamplingOptions, has_images
from ...errors import BadInput
from ..caching import CachedText
from ..rate_limit import RateLimit
from ..request_queue import Waiting
from ..uploads import shown_error
from . import branches
from .conversations import id_of, with_id
from .details import Stopwatch, details, in_line, working
from .history import DRAFT, EMPTY_BOX, Box, History, Turn, is_folded, said, to_box, to_messages, user_turn
from .settings import read_settings
from .visit import Visit

MAX_PICTURES = 8  # in one question
LOADING_SECONDS = 0.5  # between two looks at what has been fetched
REDRAW_SECONDS = 0.1  # a long conversation takes a browser about this long to draw
NO_REQUEST = -1  # a request id that never matches, so its reply writes nothing


def checked_question(text: str | None, pictures: list[str]) -> str:
    """Strips and checks a typed question. It may be empty if there is a picture."""
    text = (text or "").strip()
    if not text and not pictures:
        raise gr.Error("Please type a question first.", print_exception=False)
    if len(text) > MAX_QUESTION:
        raise gr.Error(f"Please ask in at most {MAX_QUESTION} characters.", print_exception=False)
    if len(pictures) > MAX_PICTURES:
        raise gr.Error(f"Please send at most {MAX_PICTURES} pictures at a time.", print_exception=False)
    return text


def address_of(request: gr.Request | None) -> str:
    """The address that a request came from, for the rate limit."""
    return request.client.host if request and request.client else ""


class Page:
    """Event handlers of the page, for one engine."""

    def __init__(self, engine: Engine, limit: RateLimit | None = None, examples: Sequence[Sequence[str]] = ()):
        self.engine, self.examples = engine, examples
        self.limit = limit or RateLimit(0)
        self._prefilling, self._prefills = Lock(), RateLimit(self.limit.per_minute)

    def admit(self, request: gr.Request | None) -> None:
        """Counts a question against the rate limit of its address."""
        try:
            self.limit.count(address_of(request))
        except BadInput as error:
            raise shown_error(error) from error

    def add_text(self, box: Box, history: History, visit: Visit, request: gr.Request | None = None):
        """Moves a typed question and its pictures into the conversation and clears the box."""
        question = checked_question(box["text"], box["files"])
        self.admit(request)
        speech_seconds, visit.unsent_speech = visit.unsent_speech, 0.0
        return (
            EMPTY_BOX,
            asked(history, user_turn(question, box["files"])),
            visit.request(speech_seconds=speech_seconds),
        )

    def prefill(self, box: Box, history: History, request: gr.Request | None = None) -> None:
        """Reads the pictures in the box while the question is being typed; one visitor's at a time, or not at all.

        Each address may do this as often per minute as it may ask questions.
        """
        prefill = getattr(self.engine, "prefill", None)
        if not prefill or not 0 < len(box["files"]) <= MAX_PICTURES or not self._prefills.admits(address_of(request)):
            return
        if not self._prefilling.acquire(blocking=False):
            return
        try:
            prefill([*to_messages(history), Message("user", "", box["files"])])
        except BadInput as error:
            raise shown_error(error) from error
        finally:
            self._prefilling.release()

    def add_example(self, history: History, visit: Visit, event: gr.SelectData, request: gr.Request | None = None):
        """Asks what a card of the empty conversation shows; the browser names it by its number only."""
        if not isinstance(event.index, int) or not 0 <= event.index < len(self.examples):
            raise gr.Error("There is no such example.", print_exception=False)
        question, picture = self.examples[event.index]
        self.admit(request)
        return asked(history, user_turn(question, [cached(picture)])), visit.request()

    def drop_reply(
        self, history: History, visit: Visit, event: gr.RetryData, request: gr.Request | None = None
    ) -> tuple[History, int]:
        """Retry: cuts the conversation after the question that is asked again; the new answer joins the old ones."""
        self.admit(request)
        end = event.index + 1
        return history[:end], visit.request(branches.answers_of(history[end:]))

    def ask_again(self, visit: Visit, request: gr.Request | None = None) -> int:
        """Retry of a question without an answer: Stop or an error came before its first word."""
        self.admit(request)
        return visit.request()

    def reply(self, history: History, visit: Visit, request_id: int, *settings: Any) -> Iterator[History]:
        """Streams the answer to the last question into the conversation, until Stop, or until another request comes."""
        if visit.latest == request_id:  # else another request came while this one waited in the queue
            history = history if not history or id_of(history) else with_id(history)
            earlier, is_shown = visit.earlier, False
            before = [*history, *(branches.with_answers(earlier, len(earlier) - 1) if earlier else [])]
            try:
                for answer in at_most_every(REDRAW_SECONDS, self._answers(history, visit, settings)):
                    with visit.writing(request_id) as is_latest:
                        if not is_latest:
                            break
                        is_shown = not is_folded(answer[-1])
                        answers = [*earlier, branches.plain(answer)] if earlier and is_shown else [answer]
                        yield [*history, *branches.with_answers(answers, len(answers) - 1)]
                if visit.is_stopped and not is_shown:
                    yield before
            except gr.Error:
                if not is_shown:
                    yield before
                raise
        yield gr.skip()  # gradio repeats the last value at the end, which could overwrite a newer page

    def _answers(self, history: History, visit: Visit, settings: tuple[Any, ...]) -> Iterator[History]:
        """Yields a progress row, then the growing answer, then the final or stopped answer with its details."""
        try:
            options, rewrite, system = read_settings(*settings)
        except BadInput as error:
            raise shown_error(error) from error
        messages = to_messages(history)
        if system and not has_images(messages):
            messages = [Message("system", system), *messages]
        while not visit.is_stopped and (loading := getattr(self.engine, "loading", None)) is not None:
            yield [working("Loading the models", loading)]
            time.sleep(LOADING_SECONDS)
        if visit.is_stopped:
            return
        watch, speech_seconds = Stopwatch(), visit.speech_seconds
        has_picture = bool(messages and messages[-1].images)
        yield [working("Looking at the picture" if has_picture else "Thinking")]
        answer: History = []
        with closing(self.answer(messages, options, rewrite)) as turns:
            for turn in turns:
                if visit.is_stopped:
                    break
                if is_folded(turn[-1]):  # it waits in line
                    watch = Stopwatch()
                    yield turn
                    continue
                answer = turn
                watch.piece()
                yield [working("Writing"), *answer]
        if answer:
            yield [details(self.engine, messages, answer, watch, speech_seconds), *answer]

    def ask(
        self, question: str, image: str | None = None, rewrite: bool = False, request: gr.Request | None = None
    ) -> Iterator[str]:
        """Answers one question, with or without a picture. Yields the answer so far.

        With ``rewrite``, the rewritten answer replaces the draft as it streams in.
        """
        pictures = [image] if image else []
        question = checked_question(question, pictures)
        self.admit(request)
        for turn in self.answer([Message("user", question, pictures)], rewrite=rewrite):
            if not is_folded(turn[-1]):
                yield turn[-1]["content"]

    def answer(
        self, messages: list[Message], options: SamplingOptions | None = None, rewrite: bool = False
    ) -> Iterator[History]:
        """Streams the engine's answer as turns of the page: the answer so far, or the draft and its rewrite so far.

        While it waits in line, the last turn is a row that says so.
        """
        options = options or SamplingOptions()
        try:
            draft = ""
            with closing(grow(self.engine.reply(messages, options, notify=gr.Info))) as texts:
                for draft in texts:
                    yield [as_turn(draft)]
            if rewrite:
                folded = {**said(draft), "metadata": {"title": DRAFT}}
                with closing(grow(self.engine.rewrite(messages[-1].text, draft, options))) as texts:
                    for text in texts:
                        yield [folded, as_turn(text)]
        except Exception as error:
            raise shown_error(error) from error


def asked(history: History, question: Turn) -> History:
    """The conversation with one more question; a new conversation gets an id."""
    return [*history, question] if history else with_id([question])


def cached(path: str) -> str:
    """A copy of an example's picture among the uploads, where the pictures of every conversation are."""
    return save_file_to_cache(path, get_upload_folder())


def as_turn(text: str) -> Turn:
    """An answer so far as a turn, or the row that says where its question waits in line."""
    return in_line(text.position) if isinstance(text, Waiting) else said(text)


def grow(pieces: Iterator[str]) -> Iterator[str]:
    """Pieces of text → the text so far, as CachedText if a piece is, or Waiting. Closing it closes the pieces.

    Raises:
        BadInput: there are no pieces.
    """
    text = ""
    with closing(pieces):
        for piece in pieces:
            if isinstance(piece, Waiting):
                yield piece
                continue
            kind = CachedText if isinstance(piece, CachedText) else type(text)
            text = kind(text + piece)
            yield text
    if not text:
        raise BadInput("I have no answer to that. Please rephrase your question.")


def at_most_every(seconds: float, values: Iterable[History]) -> Iterator[History]:
    """The values, without those that come too soon after another; the last one always comes."""
    shown, value, waiting = float("-inf"), None, False
    for value in values:
        waiting = time.monotonic() - shown < seconds
        if not waiting:
            yield value
            shown = time.monotonic()
    if waiting:
        yield value


def undo(history: History, visit: Visit, event: gr.UndoData) -> tuple[History, Box]:
    """Undo: moves the last question and its pictures back into the box."""
    visit.request()
    return history[: event.index], to_box(history[event.index : event.index + 1])


def stop_reply(visit: Visit) -> None:
    """Stop: ends the reply and keeps what is there."""
    visit.is_stopped = True


def leave(visit: Visit) -> None:
    """New chat: an empty request, which ends the reply."""
    visit.unsent_speech = 0.0
    visit.request()


def show_stop(visit: Visit, request_id: int) -> Any:
    """While an answer is written, Stop is in view."""
    if request_id == NO_REQUEST:
        return gr.skip()
    visit.answering = request_id
    return gr.Button(visible=True)


def hide_stop(visit: Visit, request_id: int) -> Any:
    """Hides Stop, unless another answer is expected by now."""
    return gr.Button(visible=False) if visit.answering in (None, request_id) else gr.skip()
