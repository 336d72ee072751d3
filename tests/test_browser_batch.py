"""The page "Batch" in a browser, with the real models."""

from __future__ import annotations

import csv
import json
import os
import threading
import zipfile
from io import BytesIO

import httpx
import pytest
from PIL import Image

from mmchat import Message
from mmchat.serving.page import Page, Visit
from mmchat.serving.page.batch import BatchPage
from mmchat.serving.rate_limit import RateLimit
from tests import browsing
from tests.browsing import expect, question, show, thumbnails, violations
from tests.raw import endpoints, served, upload

pytestmark = pytest.mark.browser
COLORS = ("red", "green", "blue")


@pytest.fixture
def pictures(tmp_path):
    for color in COLORS:
        Image.new("RGB", (64, 64), color).save(tmp_path / f"{color}.png")
    return [tmp_path / f"{color}.png" for color in COLORS]


@pytest.fixture
def batch(page, address):
    """A visit to the page "Batch", by its link."""
    page.get_by_role("link", name="Batch").click()
    page.get_by_label("Question about each picture").wait_for()
    assert page.url.rstrip("/") == f"{address}batch"
    return page


def give(page, files, text="What color is it?"):
    page.locator("#batch input[type=file]").first.set_input_files([str(file) for file in files])
    expect(page.locator("#batch tr.file")).to_have_count(len(files))
    page.get_by_label("Question about each picture").fill(text)
    page.get_by_role("button", name="Start", exact=True).click()


def download(page, kind):
    link = (
        page.get_by_role("link", name=f"Download {kind}").or_(page.get_by_role("button", name=f"Download {kind}")).first
    )
    expect(link).to_be_enabled()
    with page.expect_download() as given:
        link.click()
    return given.value.path()


def test_pictures_and_a_zip_are_answered_and_downloaded(batch, pictures, photo, tmp_path):
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("Thumbs.db", bytes(11 << 20))  # larger than a picture may be
        archive.write(pictures[1], "inside/green.png")
        archive.write(pictures[2], "inside/blue.png")
    give(batch, [pictures[0], tmp_path / "two.zip"])
    expect(batch.locator("#batch-note")).to_contain_text("3 of 3 answered")
    expect(batch.locator("#answers")).to_contain_text("inside/blue.png")
    with open(download(batch, "CSV"), encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["image"] for row in rows] == ["red.png", "inside/green.png", "inside/blue.png"]
    assert all(row["answer"] and not row["error"] for row in rows)
    told = [json.loads(line) for line in download(batch, "JSONL").read_text(encoding="utf-8").splitlines()]
    assert [row["answer"] for row in told] == [row["answer"] for row in rows]
    browsing.give(batch, "drop", photo)
    expect(batch.locator("#batch tr.file")).to_have_count(3)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_serious_violation(page, address, pictures, theme):
    for width, height in ((1280, 900), (390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        page.goto(f"{address}batch?__theme={theme}")
        page.get_by_label("Question about each picture").wait_for()
        page.wait_for_timeout(500)
        assert violations(page) == [], "empty"
        give(page, pictures[:2])
        expect(page.locator("#batch-note")).to_contain_text("2 of 2 answered")
        expect(page.locator("#answers")).to_contain_text("green.png")
        page.wait_for_timeout(500)
        assert violations(page) == [], "answered"
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_stop_keeps_what_is_there(batch, pictures, engine, monkeypatch):
    reply, going = engine.reply, threading.Event()

    def slow(messages, *arguments, **options):
        if messages[-1].text == "What color is it?" and reply_count.append(1) is None and len(reply_count) > 1:
            going.wait(60)
        yield from reply(messages, *arguments, **options)

    reply_count: list[int] = []
    monkeypatch.setattr(engine, "reply", slow)
    give(batch, pictures)
    expect(batch.locator("#batch-note")).to_contain_text("1 of 3")
    batch.get_by_role("button", name="Stop", exact=True).click()
    batch.wait_for_timeout(500)
    going.set()
    expect(batch.locator("#batch-note")).to_contain_text("2 of 3 answered")
    assert len(download(batch, "JSONL").read_text(encoding="utf-8").splitlines()) == 2


def test_the_conversation_keeps_its_place_on_a_phone_and_the_batch_page_scrolls(page, photo):
    page.set_viewport_size({"width": 390, "height": 844})
    page.reload()
    question(page).wait_for()
    box = page.locator("#box").bounding_box()
    assert box["y"] + box["height"] <= 844
    show(page, photo)
    question(page).fill("half a question")
    page.get_by_role("link", name="Batch").click()
    expect(page.locator("#files")).to_contain_text("Drop pictures or a ZIP here")
    last = page.get_by_text("Download JSONL")
    last.scroll_into_view_if_needed()
    box = last.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844
    page.get_by_role("link", name="Conversation").click()
    expect(question(page)).to_have_value("half a question")
    expect(thumbnails(page)).to_have_count(1)


def test_a_bad_batch_gets_a_sentence(address, tmp_path, photo):
    answer_batch = endpoints(address)["answer_batch"]
    (tmp_path / "bad.zip").write_bytes(b"PK no zip")
    bad = upload(address, tmp_path / "bad.zip")
    assert "not a ZIP file that I can read" in served(address, answer_batch, [[bad], "Hi", None])
    assert "add pictures" in served(address, answer_batch, [None, "Hi", None])
    assert "type a question" in served(address, answer_batch, [[upload(address, photo)], " ", None])
    for name, limit in (("large.zip", 100), ("large.jpg", 10)):
        large = upload(address, photo, name)
        os.truncate(large["path"], (limit << 20) + 1)
        assert f"'{name}' is larger than {limit} MB" in served(address, answer_batch, [[large], "Hi", None])
    escaping = BytesIO()
    with zipfile.ZipFile(escaping, "w") as archive:
        archive.writestr("../../escaped.png", b"x")
    (tmp_path / "odd.zip").write_bytes(escaping.getvalue())
    odd = upload(address, tmp_path / "odd.zip")
    assert "odd name" in served(address, answer_batch, [[odd], "Hi", None])
    assert httpx.get(f"{address}batch", timeout=60).status_code == 200


def test_a_batch_waits_for_the_rate_limit_and_a_failure_keeps_what_is_there(pictures, monkeypatch):
    from mmchat.serving.page import batch as batch_page

    class Engine:
        about, asked = "A stand-in.", 0

        def reply(self, messages: list[Message], options=None, notify=None):
            self.asked += 1
            if self.asked == 3:
                raise RuntimeError("/secret/path")
            yield "Red."

    seconds = [0.0]
    monkeypatch.setattr(batch_page, "LIMIT_SECONDS", 0)
    page = Page(Engine(), RateLimit(1, clock=lambda: seconds[0]))
    files = [(str(path), path.name) for path in pictures]
    shown: list[tuple] = []
    with pytest.raises(Exception, match="went wrong on my side"):
        for values in BatchPage(page).answer_batch(files, "Hi", Visit(), progress=lambda *_, **__: None):
            shown.append(values)
            seconds[0] += 20
    notes = [note for _, note, *_ in shown]
    assert notes.count("1 of 3") > 1 and notes[-1] == "2 of 3 answered"
    assert all(button.interactive for button in shown[-1][2:])
