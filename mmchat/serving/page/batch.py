"""The page "Batch": one question about many pictures, with a table of answers to download."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr

from ...conversation import SamplingOptions
from ...errors import BadInput
from ..bulk import MAX_PICTURES, Picture, about_each, answer_questions, list_pictures, write_csv, write_jsonl
from ..request_queue import Waiting
from ..uploads import MAX_FILE, MAX_ZIP, shown_error
from .components import File, PictureFiles
from .turns import Page, address_of, checked_question
from .visit import Visit

LIMIT_SECONDS = 1.0  # between two looks at the rate limit
HEADERS = ["Picture", "Answer"]
INTRODUCTION = (
    f"One question about many pictures, or a ZIP of them: at most {MAX_PICTURES} pictures of {MAX_FILE >> 20} MB, "
    f"{MAX_ZIP >> 20} MB per ZIP. Each gets the likeliest answer."
)


class BatchPage:
    """Event handlers of the page "Batch"."""

    def __init__(self, page: Page):
        self._page = page

    def answer_batch(
        self,
        files: list[File],
        question: str,
        visit: Visit,
        request: gr.Request | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (this is how gradio recognizes it)
    ) -> Iterator[tuple[Any, ...]]:
        """Answers a question about each picture; yields the table, a note, and both downloads, which come last.

        Stop ends it after the picture that is being looked at, or at once while it waits in line. Each picture counts
        as a question for the rate limit, which the batch waits for.
        """
        if not files:
            raise gr.Error("Please add pictures or a ZIP first.", print_exception=False)
        question = checked_question(question, [])
        try:
            pictures = list_pictures([path for path, _ in files], [name for _, name in files])
        except BadInput as error:
            raise shown_error(error) from error
        mine, rows, failure = visit.request(), [], None
        yield [], f"0 of {len(pictures)}", gr.DownloadButton(interactive=False), gr.DownloadButton(interactive=False)
        try:
            with closing(self._rows(pictures, question, visit, request)) as answered:
                for row in answered:
                    position = f" · waiting in line, place {row.position}" if isinstance(row, Waiting) else ""
                    if isinstance(row, dict):
                        rows.append(row)
                        progress((len(rows), len(pictures)), desc=row["image"], unit="pictures")
                    yield _table(rows), f"{len(rows)} of {len(pictures)}{position}", gr.skip(), gr.skip()
                    if visit.latest != mine:
                        break
        except Exception as error:  # what is there can still be downloaded
            failure = shown_error(error)
        with TemporaryDirectory() as folder:  # gradio copies the files into its cache
            spreadsheet, lines = Path(folder) / "answers.csv", Path(folder) / "answers.jsonl"
            write_csv(spreadsheet, rows)
            write_jsonl(lines, rows)
            note = f"{len(rows)} of {len(pictures)} answered"
            downloads = [gr.DownloadButton(value=str(file), interactive=bool(rows)) for file in (spreadsheet, lines)]
            yield _table(rows), note, *downloads
        if failure:
            raise failure

    def _rows(
        self, pictures: list[Picture], question: str, visit: Visit, request: gr.Request | None
    ) -> Iterator[dict[str, Any] | Waiting | None]:
        """Each picture's answer, its position while it waits in line, or None while it waits for the rate limit."""
        options = SamplingOptions(temperature=0)
        for asked in about_each(pictures, question):
            while not self._page.limit.admits(address_of(request)):
                yield None
                time.sleep(LIMIT_SECONDS)
            yield from answer_questions(self._page.engine, [asked], options)


def _table(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [[row["image"], row["answer"] or row.get("error") or ""] for row in rows]


def stop_batch(visit: Visit) -> None:
    """Ends the batch after the picture that is being looked at."""
    visit.request()


def build_batch(page: Page) -> None:
    """Places the page and connects it."""
    batch = BatchPage(page)
    with gr.Column(elem_id="batch", scale=1, min_width=0):
        gr.Markdown(f"# Batch\n\n{INTRODUCTION}")
        files = PictureFiles(
            label="Pictures or a ZIP",
            file_count="multiple",
            file_types=["image", ".zip"],
            height=160,
            elem_id="files",
        )
        question = gr.Textbox(
            label="Question about each picture", placeholder="Such as: What is this?", lines=1, max_lines=4
        )
        with gr.Row():
            start = gr.Button("Start", variant="primary", min_width=80)
            stop = gr.Button("Stop", min_width=80)
        note = gr.Markdown(" ", min_height=40, elem_id="batch-note")
        table = gr.Dataframe(
            headers=HEADERS,
            datatype="str",
            interactive=False,
            wrap=True,
            label="Answers",
            max_height=400,
            elem_id="answers",
        )
        with gr.Row():
            downloads = [
                gr.DownloadButton(f"Download {kind}", interactive=False, min_width=120) for kind in ("CSV", "JSONL")
            ]
    visit = gr.State(Visit())
    private = {"api_visibility": "private"}
    start.click(
        batch.answer_batch,
        [files, question, visit],
        [table, note, *downloads],
        concurrency_id="batch",
        concurrency_limit=2,
        show_progress="minimal",
        show_progress_on=note,
        **private,
    )
    stop.click(stop_batch, visit, None, queue=False, show_progress="hidden", **private)
