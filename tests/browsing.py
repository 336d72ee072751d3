"""Chromium for the tests of the page, and what a visitor does with it."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import time
import wave
from contextlib import closing
from importlib.resources import files
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
DESKTOP = {"width": 1280, "height": 900}
FORGET = """() => new Promise(resolve => {
    localStorage.clear();
    const request = indexedDB.deleteDatabase('mmchat');
    request.onsuccess = request.onerror = resolve; })"""
# The last answer is whole: its details stand before it, no row says what is going on, and Stop is gone.
WHOLE = """() => {
    const rows = [...document.querySelectorAll('#chat .message-row')];
    const answer = rows.slice(rows.findLastIndex(row => row.matches('.user-row')) + 1);
    const isFolded = row => row.querySelector('.thought-group');
    const titles = answer.filter(isFolded).map(row => row.innerText);
    return answer.length && !isFolded(answer.at(-1)) && titles.some(title => title.includes('Details'))
        && ![...document.querySelectorAll('#status button')].some(button => button.checkVisibility()); }"""
GIVE = """([kind, data, where]) => { const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
    const given = new DataTransfer(), told = {bubbles: true, cancelable: true};
    given.items.add(new File([bytes], 'photo.jpg', {type: 'image/jpeg'}));
    document.querySelector(where).dispatchEvent(kind === 'drop'
        ? new DragEvent('drop', {...told, dataTransfer: given})
        : new ClipboardEvent('paste', {...told, clipboardData: given})); }"""
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


@pytest.fixture(scope="module")
def visitor(browser):
    """The browser of one visitor: its cache is warm after the first visit."""
    context = browser.new_context(permissions=["microphone"])
    context.set_default_timeout(PATIENCE)
    yield context
    context.close()


@pytest.fixture
def page(visitor, address):
    """A first visit. Fails if the page sends a request to another machine."""
    page = visitor.new_page()
    page.set_viewport_size(DESKTOP)
    strangers = []
    page.on("request", lambda r: strangers.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
    page.goto(address)
    question(page).wait_for()
    yield page
    page.goto(f"{address}config")  # nothing saves any more
    page.evaluate(FORGET)
    page.close()
    assert strangers == []


@pytest.fixture
def slow_writing(engine, monkeypatch):
    """A long answer takes ten seconds or more, so that the browser of a busy machine meets it half-written."""
    reply = engine.reply

    def slowly(*arguments, **options):
        with closing(reply(*arguments, **options)) as pieces:
            for piece in pieces:
                time.sleep(0.05)
                yield piece

    monkeypatch.setattr(engine, "reply", slowly)


def question(page):
    return page.locator("#box textarea")


def answers(page):
    """The answers, without what is folded above them."""
    return page.locator("#chat .bot-row .message:not(:has(.thought-group)) .prose")


def ask(page, text):
    """Sends a question, and waits until it is in the conversation, or refused."""
    shown = page.locator("#chat .user-row").count()
    question(page).fill(text)
    page.get_by_role("button", name="Send", exact=True).click()
    page.wait_for_function(
        "shown => document.querySelectorAll('#chat .user-row').length > shown || document.querySelector('.toast-body')",
        arg=shown,
    )


def show(page, path):
    """Adds a picture to the question with the button, and waits for its thumbnail."""
    count = thumbnails(page).count()
    with page.expect_file_chooser() as chooser:
        page.locator("#box").get_by_test_id("upload-button").click()
    chooser.value.set_files(str(path))
    expect(thumbnails(page)).to_have_count(count + 1)


def give(page, kind, photo, where="body"):
    """Drops or pastes a JPEG on an element."""
    page.evaluate(GIVE, [kind, base64.b64encode(photo.read_bytes()).decode(), where])


def thumbnails(page):
    return page.locator("#box .thumbnail-item")


def finished(page):
    """Waits until the last question is answered."""
    page.wait_for_function(WHOLE)


def is_still(page):
    """Whether what was said stays as it is for half a second."""
    said = answers(page).all_inner_texts()
    page.wait_for_timeout(500)
    return answers(page).all_inner_texts() == said


def violations(page):
    """Serious findings of axe-core: rule, and the elements."""
    axe = pytest.importorskip("axe_playwright_python", reason="pip install axe-playwright-python: axe-core")
    page.evaluate((files(axe) / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("async () => (await axe.run(document, {resultTypes: ['violations']})).violations")
    serious = [rule for rule in found if rule["impact"] in ("serious", "critical")]
    return [(rule["id"], [node["html"][:200] for node in rule["nodes"]]) for rule in serious]


def expect(locator):
    from playwright.sync_api import expect as playwright_expect

    playwright_expect.set_options(timeout=PATIENCE)
    return playwright_expect(locator)


def reload(page):
    page.wait_for_timeout(300)  # a person is slower than a conversation is saved
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
