"""The page's layout, and which event calls which function."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from ...conversation import MAX_QUESTION, Engine
from ..feedback import FeedbackStore
from ..rate_limit import RateLimit
from ..uploads import KEEP_UPLOADS, MAX_RECORDING, SafeImage
from . import branches, conversations, turns
from .assets import asset
from .batch import build_batch
from .components import Conversation, QuestionBox
from .examples import cards, read_examples
from .front_end import FrontEnd
from .settings import build_settings, default_settings
from .thumbs import OPTIONS, Thumbs, ThumbsPage, build_thumbs, close, connect_thumbs
from .turns import Page
from .visit import Visit
from .voice import VoicePage, VoiceTab, build_clips, build_speaker, build_voice_tab, connect_voice

MAX_CONCURRENT = 8  # answers generated at the same time, in one batch
MAX_WAITING = 16  # questions in the queue; the next one is turned away

# Markdown in an answer may link pictures anywhere on the web; the browser must not fetch them.
CONTENT_SECURITY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"img-src 'self' data: blob:; media-src 'self' data: blob:\">"
)
MAIN_PAGE = "Conversation"  # in the bar that leads to the other page, "Batch"
PLACEHOLDER = "<h2>Ask about a picture</h2><p>Drop one anywhere and type or speak, or begin with an example.</p>"


@dataclass(frozen=True)
class Parts:
    """The components of the page, for the files that add to it."""

    chat: Conversation
    box: QuestionBox
    voice: VoiceTab
    status: gr.Markdown  # a thin row above the box: position in line, progress, errors
    stop: gr.Button
    fresh: gr.Button  # "New chat"
    listing: gr.HTML  # the conversations in the visitor's browser
    save: gr.Button
    save_json: gr.Button
    settings: list[Any]
    reset: gr.Button
    buttons: gr.HTML  # puts buttons on questions
    about: gr.Markdown
    visit: gr.State
    request_id: gr.Number  # lives in the browser and tells a reply its request
    thumbs: Thumbs | None  # where feedback is stored


def build(
    engine: Engine, examples: Path, limit: RateLimit | None = None, feedback: FeedbackStore | None = None
) -> gr.Blocks:
    """Builds the page for an engine.

    Args:
        examples: a folder with examples.csv and its pictures.
        limit: rate limit per address; none if None.
        feedback: where thumbs and better answers are stored; no thumbs if None.
    """
    page = Page(engine, limit, read_examples(examples))
    with gr.Blocks(title="mmchat", fill_height=True, delete_cache=(max(KEEP_UPLOADS // 12, 1), KEEP_UPLOADS)) as demo:
        parts = _place(page, has_thumbs=feedback is not None)
        _connect(demo, page, parts)
        if feedback:
            _connect_thumbs(ThumbsPage(feedback, page.admit), parts)
        _add_endpoint(page)
    with demo.route("Batch", "/batch"):
        gr.Navbar(main_page_name=MAIN_PAGE)
        build_batch(page)
    demo.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    _poll_less(demo)
    return demo


def _poll_less(demo: gr.Blocks) -> None:
    """Makes gradio's queue look for work a hundred times a second, not a thousand, and for progress ten times.

    On a slow core, a thousand times take a tenth of it, which answers need. Gradio has no option for it.
    """
    demo._queue.sleep_when_free, demo._queue.progress_update_sleep_when_free = 0.01, 0.1


def _place(page: Page, has_thumbs: bool) -> Parts:
    gr.Navbar(main_page_name=MAIN_PAGE)
    with gr.Sidebar(open=False, width=280, elem_id="side"):
        fresh = gr.Button("New chat", size="sm", elem_id="fresh")
        listing = conversations.build_list()
        with gr.Row():
            save, save_json = (gr.Button(name, size="sm", min_width=80) for name in ("Save", "Save JSON"))
        settings = build_settings()
        reset = gr.Button("Reset settings", size="sm")
        about = gr.Markdown(elem_id="about")
    with gr.Column(elem_id="app", scale=1, min_width=0):
        gr.Markdown("# mmchat", elem_id="top")
        chat = Conversation(
            label="Conversation",
            show_label=False,
            container=False,
            elem_id="chat",
            height=None,
            scale=1,
            placeholder=PLACEHOLDER,
            examples=cards(page.examples),
            buttons=["copy"],
            feedback_options=OPTIONS if has_thumbs else None,
            group_consecutive_messages=False,  # else copying an answer copies what is folded above it, too
            allow_tags=False,
            allow_file_downloads=False,
        )
        with gr.Row(elem_id="status"):
            status = gr.Markdown(" ", min_height=24)
            stop = gr.Button("Stop", size="sm", scale=0, min_width=80, visible=False)
        thumbs = build_thumbs() if has_thumbs else None
        speaker, clips = build_speaker(), build_clips()
        with gr.Column(elem_id="composer", scale=0, min_width=0), gr.Tabs(elem_id="tabs"):
            with gr.Tab("Text", id="text"):
                box = QuestionBox(
                    label="Your question",
                    show_label=False,
                    placeholder="Ask anything",
                    elem_id="box",
                    file_count="multiple",
                    file_types=["image"],
                    sources=["upload"],
                    submit_btn="Send",
                    max_lines=6,
                    max_plain_text_length=MAX_QUESTION + 1,  # a longer paste would become a text file
                    autofocus=True,
                )
            voice = build_voice_tab(speaker, clips)
    buttons = gr.HTML(visible="hidden", js_on_load=asset("buttons.js"))
    visit, request_id = gr.State(Visit()), gr.Number(visible=False)
    return Parts(
        chat,
        box,
        voice,
        status,
        stop,
        fresh,
        listing,
        save,
        save_json,
        settings,
        reset,
        buttons,
        about,
        visit,
        request_id,
        thumbs,
    )


def _connect_thumbs(page: ThumbsPage, parts: Parts) -> None:
    quick = {"api_visibility": "private", "show_progress_on": parts.status, "show_progress": "hidden"}
    thumbs = parts.thumbs
    connect_thumbs(page, parts.chat, thumbs, quick)
    shut = {"fn": close, "outputs": [thumbs.form, thumbs.better, thumbs.rated], "queue": False, **quick}
    gr.on([parts.fresh.click, parts.chat.clear], **shut)
    parts.listing.open(**shut)


def _connect(demo: gr.Blocks, page: Page, parts: Parts) -> None:
    # Progress and errors are shown in the status row; shown on the conversation, an error would cover all of it.
    private = {"api_visibility": "private", "show_progress_on": parts.status}
    quick = {**private, "show_progress": "hidden"}
    chat, box, visit, request_id, stop = parts.chat, parts.box, parts.visit, parts.request_id, parts.stop
    voice = VoicePage(page)

    keep = {"fn": None, "inputs": chat, "js": "(history) => mmchat.store.save(history)", **quick}
    revive = "(...values) => mmchat.store.reviveFirst(values)"

    # However a question is asked, its answer follows its request id: a browser looks each event up for each component.
    many = {"trigger_mode": "multiple"}  # a new question does not wait for the reply that it ends
    request_id.change(**many, **keep)
    request_id.change(turns.show_stop, [visit, request_id], stop, queue=False, **many, **quick).success(
        voice.reply,
        [chat, visit, request_id, *parts.settings, parts.voice.aloud],
        [chat, parts.voice.clips],
        concurrency_id="engine",
        concurrency_limit=MAX_CONCURRENT,
        show_progress="minimal",
        js=revive,
        **many,
        **private,
    ).then(turns.hide_stop, [visit, request_id], stop, queue=False, **quick).then(**keep)

    told = [parts.about, parts.voice.language]
    demo.load(lambda: (page.engine.about, voice.languages()), None, told, queue=False, **quick)
    kept = [*parts.settings, parts.voice.check, parts.voice.aloud, box]
    demo.load(None, None, kept, js=f"() => mmchat.start({json.dumps(default_settings())})", api_visibility="private")
    box.change(None, box, None, js="box => mmchat.draft.write(box)", **quick)
    demo.load(None, None, chat, js="() => mmchat.store.reopen()", api_visibility="private")
    parts.buttons.pictures(page.prefill, [box, chat], None, queue=False, **quick)
    box.submit(page.add_text, [box, chat, visit], [box, chat, request_id], **quick)
    connect_voice(voice, parts, quick)
    chat.example_select(page.add_example, [chat, visit], [chat, request_id], **quick)
    chat.retry(page.drop_reply, [chat, visit], [chat, request_id], **quick)
    parts.buttons.again(page.ask_again, visit, request_id, **quick)
    # Queued, so that it reaches the page after what the reply has sent.
    chat.undo(turns.undo, [chat, visit], [chat, box], js=revive, **quick).then(
        **{**keep, "js": "(history) => mmchat.store.undone(history)"}
    )
    chat.option_select(branches.flip, [chat, visit], chat, **quick).then(**keep)
    parts.buttons.edit(branches.edit, [chat, visit], [chat, box], js=revive, **quick)
    remember = {"fn": None, "js": "(...values) => mmchat.settings.write(values)", **quick}
    changes = [setting.change for setting in parts.settings]
    gr.on(changes, inputs=parts.settings, trigger_mode="always_last", **remember)
    parts.reset.click(default_settings, None, parts.settings, queue=False, **quick).then(
        inputs=parts.settings, **remember
    )
    stop.click(turns.stop_reply, visit, None, queue=False, **quick)
    listing = parts.listing
    emptied, new_chat = [box, parts.voice.recording, chat], [parts.fresh.click, chat.clear]
    gr.on(new_chat, None, None, emptied, js="() => mmchat.store.fresh()", **quick)
    # Sent at once: after the other it could reach the server after the next question, and end the reply to that.
    gr.on(new_chat, turns.leave, visit, None, queue=False, **quick).then(
        None, chat, chat, js="(history) => mmchat.store.settle(history)", **quick
    )
    leave = {**keep, "js": "(history) => mmchat.store.save(history, false)"}  # an answer that is being written
    listing.open(**leave).then(turns.leave, visit, None, **quick).then(
        None, None, chat, js="() => [mmchat.store.arrived(mmchat.opened)]", **quick
    )
    listing.notice(conversations.show_notice, None, None, trigger_mode="multiple", **quick)  # two may come at once
    parts.save.click(None, chat, None, js="(history) => mmchat.transfer.saveMarkdown(history)", **quick)
    parts.save_json.click(None, chat, None, js="(history) => mmchat.transfer.saveJson(history)", **quick)


def _add_endpoint(page: Page) -> None:
    """The public API: ``ask(question, image, rewrite) -> answer``, streamed. Hidden components check uploads."""
    with gr.Group(visible=False):  # each is hidden itself, too: a browser would fetch the scripts of the others
        question = gr.Textbox(label="question", visible=False)
        picture = SafeImage(type="filepath", label="image", visible=False)
        rewrite, answer = gr.Checkbox(label="rewrite", visible=False), gr.Textbox(label="answer", visible=False)
        gr.Button(visible=False).click(
            page.ask,
            [question, picture, rewrite],
            answer,
            api_name="ask",
            concurrency_id="engine",
            concurrency_limit=MAX_CONCURRENT,
        )


def look() -> gr.themes.Base:
    """The theme: gradio's Soft, with the contrast that small text needs."""
    return gr.themes.Soft(primary_hue="indigo", font=["system-ui", "sans-serif"]).set(
        color_accent="*primary_700",
        block_title_text_color="*primary_700",
        block_title_text_color_dark="white",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        block_label_text_color="*primary_700",
        body_text_color_subdued="*neutral_600",
        checkbox_border_color="*neutral_500",
    )


def launch(demo: gr.Blocks, app_kwargs: dict[str, Any] | None = None, **options: Any):
    """Serves the page.

    Args:
        app_kwargs: options of the web application, such as routes beside the page.
        options: options of gradio's launch, such as server_name and server_port.
    """
    script = "\n".join(asset(name) for name in ("page.js", "store.js", "thumbs.js", "transfer.js"))
    return demo.launch(
        theme=look(),
        css=asset("page.css"),
        head=f"{CONTENT_SECURITY}<script>{script}</script>",
        max_file_size=MAX_RECORDING,  # the largest upload
        show_error=False,
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        footer_links=[],
        i18n=gr.I18n(en={"upload_text.drop_file": "Drop pictures or a ZIP here"}),
        app_kwargs={**(app_kwargs or {}), "middleware": [Middleware(FrontEnd, demo=demo)]},
        **options,
    )
