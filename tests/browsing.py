"""Chromium for the tests of the page, and what a visitor does with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import wave
from pathlib import Path

import pytest

from mmchat.media import SAMPLE_RATE, read_audio

SPEECH = Path(__file__).parent / "data" / "jfk.flac"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
PATIENCE = 60_000  # milliseconds; two cores may be busy


def find_chromium() -> str:
    """Path of Chromium, found or installed; without one the tests are skipped with a message."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if not found and shutil.which("apt-get") and os.geteuid() == 0:
        print("No Chromium found: installing it with apt-get")
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"], check=False)
        found = shutil.which("chromium")
    if not found:
        complain = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        complain("no Chromium on this machine: install it to run the browser tests")
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium whose microphone plays recorded speech."""
    sync_api = pytest.importorskip("playwright.sync_api")
    microphone = tmp_path_factory.mktemp("microphone") / "speech.wav"
    with wave.open(str(microphone), "wb") as sink:
        sink.setnchannels(1)
        sink.setsampwidth(2)
        sink.setframerate(SAMPLE_RATE)
        sink.writeframes((read_audio(SPEECH) * 32767).astype("<i2").tobytes())
    flags = [*FLAGS, f"--use-file-for-fake-audio-capture={microphone}"]
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    """A fresh visit. Fails if the page sends a request to another machine."""
    context = browser.new_context(permissions=["microphone"], viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    strangers = []
    page.on("request", lambda r: strangers.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
    page.goto(address)
    question(page).wait_for()
    yield page
    context.close()
    assert strangers == []


def question(page):
    return page.locator("#box textarea")


def answers(page):
    """The answers, without what is folded above them."""
    return page.locator("#chat .bot-row .message:not(:has(.thought-group)) .prose")


def ask(page, text):
    question(page).fill(text)
    page.get_by_role("button", name="Send", exact=True).click()


def show(page, path):
    """Adds a picture to the question, and waits for its thumbnail."""
    count = thumbnails(page).count()
    page.locator("#box input[type=file]").set_input_files(str(path))
    expect(thumbnails(page)).to_have_count(count + 1)


def thumbnails(page):
    return page.locator("#box .thumbnail-item")


def finished(page):
    """Waits until the last answer stops growing for three seconds."""
    answers(page).last.wait_for()
    text = None
    while text != (text := answers(page).last.inner_text()) or not text:
        page.wait_for_timeout(3_000)


def expect(locator):
    from playwright.sync_api import expect as playwright_expect

    playwright_expect.set_options(timeout=PATIENCE)
    return playwright_expect(locator)


def reload(page):
    page.reload()
    question(page).wait_for()


def record_replies(engine, monkeypatch, note=lambda messages, *options: messages) -> list:
    """The list to which every reply from now on adds what ``note`` makes of its messages and options."""
    noted, reply = [], engine.reply

    def recorded(messages, *arguments, **options):
        noted.append(note(messages, *arguments))
        return reply(messages, *arguments, **options)

    monkeypatch.setattr(engine, "reply", recorded)
    return noted
