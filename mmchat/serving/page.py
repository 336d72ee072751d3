"""The web page. It sends plain data to the engine and gets text back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from ..conversation import Engine, Message, SamplingOptions
from ..errors import BadInput
from .rate_limit import RateLimit
from .uploads import KEEP_UPLOADS, MAX_UPLOAD, SafeImage, is_uploaded, shown_error

MAX_QUESTION = 4000  # characters
MAX_CONCURRENT = 4  # answers generated at the same time; they take turns, so a short one does not wait for a long one
MAX_WAITING = 16  # questions in the queue; the next one is turned away

# Markdown in an answer may link pictures anywhere on the web; the browser must not fetch them.
CONTENT_SECURITY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"img-src 'self' data: blob:; media-src 'self' data: blob:\">"
)
STYLE = "#chat button[aria-label=Share] {display: none} footer {opacity: .7}"

SAVE_SCRIPT = """(history) => {
    const say = part => part.type === 'text' ? part.text : `[${part.file?.orig_name ?? part.type}]`;
    const who = turn => turn.metadata?.title ? `${turn.role}, ${turn.metadata.title.toLowerCase()}` : turn.role;
    const text = history.map(turn => `**${who(turn)}**: ` + turn.content.map(say).join(' ')).join('\\n\\n');
    const blob = new Blob([text + '\\n'], {type: 'text/markdown'});
    const link = Object.assign(document.createElement('a'),
        {href: URL.createObjectURL(blob), download: 'conversation.md'});
    link.click();
    URL.revokeObjectURL(link.href);
}"""

History = list[dict[str, Any]]
DRAFT = "Draft"  # title of an answer that was rewritten; the page collapses it, and the model does not see it again


def to_messages(history: History) -> list[Message]:
    """Converts the page's conversation to messages.

    The browser sends it, so unknown roles and parts are dropped, as are files that are not uploads. Drafts and deleted
    pictures are dropped, too.
    """
    messages = []
    for turn in history:
        if turn.get("role") not in ("user", "assistant") or (turn.get("metadata") or {}).get("title") == DRAFT:
            continue
        parts = turn["content"] if isinstance(turn["content"], list) else [{"type": "text", "text": turn["content"]}]
        text = "\n".join(part["text"] for part in parts if part.get("type") == "text")
        files = [Path(part["file"]["path"]) for part in parts if part.get("type") == "file"]
        messages.append(
            Message(turn["role"], text, [path for path in files if is_uploaded(path.resolve()) and path.is_file()])
        )
    return messages


def user_turn(text: str, image: str | None) -> dict[str, Any]:
    """A question as the page shows it: the picture above the text."""
    picture = [{"path": image, "alt_text": "Uploaded picture"}] if image else []
    return {"role": "user", "content": [*picture, *([text] if text else [])]}


def checked_question(text: str | None, image: str | None) -> str:
    """Strips and checks a typed question. It may be empty if there is a picture."""
    text = (text or "").strip()
    if not text and not image:
        raise gr.Error("Please type a question first.", print_exception=False)
    if len(text) > MAX_QUESTION:
        raise gr.Error(f"Please ask in at most {MAX_QUESTION} characters.", print_exception=False)
    return text


NO_REQUEST = -1  # a request id that never matches, so its reply writes nothing


class Visit:
    """One visit to the page. Each request gets an id, and only the latest request may write to the page.

    This is how Stop, Clear, Undo and a new question end a reply. With gradio's own ``cancels``, the old reply would
    overwrite the new question, and cancelling works only once.
    """

    def __init__(self):
        self.latest = 0

    def request(self) -> int:
        """Starts a request, which ends the previous one."""
        self.latest += 1
        return self.latest


class Page:
    """Event handlers of the page, for one engine."""

    def __init__(self, engine: Engine, limit: RateLimit | None = None):
        self.engine = engine
        self.limit = limit or RateLimit(0)

    def admit(self, request: gr.Request | None) -> None:
        """Counts a question against the rate limit of its address."""
        try:
            self.limit.count(request.client.host if request and request.client else "")
        except BadInput as error:
            raise shown_error(error) from error

    def add_text(self, text: str, image: str | None, history: History, visit: Visit, request: gr.Request | None = None):
        """Moves a typed question and its picture into the conversation and clears both inputs."""
        question = checked_question(text, image)
        self.admit(request)
        return "", None, [*history, user_turn(question, image)], visit.request()

    def add_voice(
        self,
        recording: str | None,
        image: str | None,
        history: History,
        visit: Visit,
        request: gr.Request | None = None,
    ):
        """Transcribes a recording and moves it into the conversation as text."""
        if not recording:
            raise gr.Error("Please record or upload a question first.", print_exception=False)
        self.admit(request)
        request_id = visit.request()  # before the work: a running reply would overwrite this question
        try:
            question = self.engine.transcribe(recording).text
        except Exception as error:
            raise shown_error(error) from error
        if visit.latest != request_id:  # another request came during transcription
            return gr.skip(), gr.skip(), gr.skip(), NO_REQUEST
        return None, None, [*history, user_turn(question, image)], request_id

    def drop_reply(
        self, history: History, visit: Visit, event: gr.RetryData, request: gr.Request | None = None
    ) -> tuple[History, int]:
        """Retry: cuts the conversation after the question that is asked again."""
        self.admit(request)
        return history[: event.index + 1], visit.request()

    def reply(
        self, history: History, visit: Visit, request_id: int, temperature: float, max_new_tokens: float, rewrite: bool
    ) -> Iterator[History]:
        """Streams the answer to the last question into the conversation, until another request comes."""
        if visit.latest == request_id:  # else another request came while this one waited in the queue
            options = {"temperature": temperature, "max_new_tokens": max_new_tokens, "rewrite": rewrite}
            with closing(self.answer(to_messages(history), **options)) as turns:
                for turn in turns:
                    if visit.latest != request_id:
                        break
                    yield [*history, *turn]
        yield gr.skip()  # gradio repeats the last value at the end, which could overwrite a newer page

    def ask(
        self, question: str, image: str | None = None, rewrite: bool = False, request: gr.Request | None = None
    ) -> Iterator[str]:
        """Answers one question, with or without a picture. Yields the answer so far.

        With ``rewrite``, the rewritten answer replaces the draft as it streams in.
        """
        question = checked_question(question, image)
        self.admit(request)
        for turn in self.answer([Message("user", question, [image] if image else [])], rewrite=rewrite):
            yield turn[-1]["content"]

    def answer(
        self,
        messages: list[Message],
        *,
        temperature: float | None = None,
        max_new_tokens: float | None = None,
        rewrite: bool = False,
    ) -> Iterator[History]:
        """Streams the engine's answer as turns of the page: the answer so far, or the draft and its rewrite so far."""
        try:
            given = {"temperature": temperature, "max_new_tokens": max_new_tokens and int(max_new_tokens)}
            options = SamplingOptions(**{name: value for name, value in given.items() if value is not None})
            draft = ""
            with closing(grow(self.engine.reply(messages, options, notify=gr.Info))) as texts:
                for draft in texts:
                    yield [said(draft)]
            if rewrite:
                folded = {**said(draft), "metadata": {"title": DRAFT}}
                with closing(grow(self.engine.rewrite(messages[-1].text, draft, options))) as texts:
                    for text in texts:
                        yield [folded, said(text)]
        except Exception as error:
            raise shown_error(error) from error


def said(text: str) -> dict[str, Any]:
    """An answer as the page shows it."""
    return {"role": "assistant", "content": text}


def grow(pieces: Iterator[str]) -> Iterator[str]:
    """Pieces of text → the text so far. Closing it closes the pieces.

    Raises:
        BadInput: there are no pieces.
    """
    text = ""
    with closing(pieces):
        for piece in pieces:
            text += piece
            yield text
    if not text:
        raise BadInput("I have no answer to that. Please rephrase your question.")


def undo(history: History, visit: Visit, event: gr.UndoData) -> tuple[History, str, str | None]:
    """Undo: moves the last question and its picture back into the inputs."""
    visit.request()
    (question,) = to_messages(history[event.index : event.index + 1]) or [Message("user", "")]
    return history[: event.index], question.text, str(question.images[0]) if question.images else None


def stop_reply(visit: Visit) -> None:
    """Stop: an empty request, which ends the reply."""
    visit.request()


def clear_all(visit: Visit) -> tuple[str, None, None, History]:
    """Clear: resets text, picture, recording and conversation."""
    visit.request()
    return "", None, None, []


def read_examples(folder: Path) -> list[list[str]]:
    """Pairs of question and picture from ``examples.csv``; empty if there is no such file."""
    import csv

    table = folder / "examples.csv"
    if not table.is_file():
        return []
    with table.open(newline="", encoding="utf-8") as lines:
        return [[row["question"], str(folder / row["image"])] for row in csv.DictReader(lines)]


def build(engine: Engine, examples: Path, limit: RateLimit | None = None) -> gr.Blocks:
    """Builds the page for an engine.

    Args:
        examples: a folder with examples.csv and its pictures.
        limit: rate limit per address; none if None.
    """
    page = Page(engine, limit)
    defaults = SamplingOptions()
    with gr.Blocks(title="mmchat", fill_height=True, delete_cache=(KEEP_UPLOADS // 12, KEEP_UPLOADS)) as demo:
        gr.Markdown("# mmchat\nAsk by typing or speaking. Add a picture to talk about it.")
        with gr.Row(scale=1):
            with gr.Column(scale=2, min_width=320):
                chat = gr.Chatbot(
                    label="Conversation",
                    elem_id="chat",
                    height="65vh",
                    placeholder="Add a picture or just ask.",
                    buttons=["copy", "copy_all"],
                    feedback_options=None,
                    allow_tags=False,
                    allow_file_downloads=False,
                )
            with gr.Column(scale=1, min_width=300):
                image = SafeImage(
                    type="filepath",
                    sources=["upload", "webcam", "clipboard"],
                    label="Picture (optional)",
                    height=220,
                    elem_id="image",
                )
                with gr.Tabs():
                    with gr.Tab("Text", id="text"):
                        text = gr.Textbox(
                            label="Your question",
                            lines=1,
                            max_lines=6,
                            max_length=MAX_QUESTION,
                            submit_btn="Send",
                            autofocus=True,
                        )
                    with gr.Tab("Voice", id="voice"):
                        recording = gr.Audio(
                            type="filepath",
                            sources=["microphone", "upload"],
                            label="Speak your question",
                            elem_id="mic",
                            waveform_options=gr.WaveformOptions(sample_rate=16000),
                            buttons=[],
                        )
                        send_recording = gr.Button("Send recording", variant="primary")
                with gr.Row():
                    stop, clear, save = (gr.Button(name, size="sm", min_width=80) for name in ("Stop", "Clear", "Save"))
                with gr.Accordion("Options", open=False):
                    temperature = gr.Slider(
                        0, 1.5, defaults.temperature, step=0.1, label="Temperature", info="0 is the likeliest answer"
                    )
                    max_new_tokens = gr.Slider(
                        16, 1024, defaults.max_new_tokens, step=16, label="Longest answer", info="in tokens"
                    )
                    rewrite = gr.Checkbox(
                        label="Rewrite answers", info="in better English, by the same model without its adapter"
                    )
                if rows := read_examples(examples):
                    gr.Examples(rows, inputs=[text, image], label="Examples")
        about = gr.Markdown(elem_id="about")

        # Progress and errors are shown on the Stop button; shown on the conversation, an error would cover all of it.
        private = {"api_visibility": "private", "show_progress_on": stop}
        quick = {**private, "show_progress": "hidden"}
        demo.load(lambda: engine.about, None, about, queue=False, show_progress="hidden", api_visibility="private")
        visit = gr.State(Visit())
        request_id = gr.Number(visible=False)  # lives in the browser and tells a reply its request
        run = {
            "fn": page.reply,
            "inputs": [chat, visit, request_id, temperature, max_new_tokens, rewrite],
            "outputs": chat,
            "concurrency_id": "engine",
            "concurrency_limit": MAX_CONCURRENT,
            "trigger_mode": "multiple",  # a new question does not wait for the reply that it ends
            "show_progress": "minimal",
            **private,
        }
        typed, spoken = [text, image, chat, visit], [recording, image, chat, visit]
        text.submit(page.add_text, typed, [text, image, chat, request_id], **quick).success(**run)
        send_recording.click(page.add_voice, spoken, [recording, image, chat, request_id], **quick).success(**run)
        chat.retry(page.drop_reply, [chat, visit], [chat, request_id], **quick).success(**run)
        chat.undo(undo, [chat, visit], [chat, text, image], queue=False, **quick)
        stop.click(stop_reply, visit, None, queue=False, **quick)
        everything = [text, image, recording, chat]
        gr.on([clear.click, chat.clear], clear_all, visit, everything, queue=False, **quick)
        save.click(None, chat, None, js=SAVE_SCRIPT, queue=False, **quick)
        _add_endpoint(page)
    return demo.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def _add_endpoint(page: Page) -> None:
    """The public API: ``ask(question, image, rewrite) -> answer``, streamed. Hidden components check uploads."""
    with gr.Group(visible=False):
        question, picture = gr.Textbox(label="question"), SafeImage(type="filepath", label="image")
        rewrite, answer = gr.Checkbox(label="rewrite"), gr.Textbox(label="answer")
        gr.Button().click(
            page.ask,
            [question, picture, rewrite],
            answer,
            api_name="ask",
            concurrency_id="engine",
            concurrency_limit=MAX_CONCURRENT,
        )


def launch(demo: gr.Blocks, **options: Any):
    """Serves the page. ``options`` are passed to gradio's launch, such as server_name and server_port."""
    return demo.launch(
        theme=gr.themes.Soft(primary_hue="indigo", font=["system-ui", "sans-serif"]),
        css=STYLE,
        head=CONTENT_SECURITY,
        max_file_size=MAX_UPLOAD,
        show_error=False,
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        footer_links=["api", "settings"],
        **options,
    )
