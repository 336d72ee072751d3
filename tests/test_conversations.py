"""Conversations in the visitor's browser: kept, found again, exported and imported; with the real models."""

from __future__ import annotations

import base64
import json
import time

import gradio as gr
import numpy as np
import pytest
from PIL import Image

from mmchat.serving.page.conversations import NOTICES
from tests.browsing import DESKTOP, PATIENCE, answers, ask, expect, finished, question, record_replies, reload, show

pytestmark = pytest.mark.browser

TRICKY = "## User\n\\## Assistant\n<!-- mmchat {} -->\n# title\n![a](b)\n\n  two\nlines\n\n"
CLEAR_COPIES = """() => new Promise(resolve => { const request = indexedDB.open('mmchat');
    request.onsuccess = () => { const all = request.result.transaction('pictures', 'readwrite');
        all.objectStore('pictures').clear(); all.oncomplete = () => { request.result.close(); resolve(); }; }; })"""


COPIES = """async () => { const [chat] = await mmchat.store.list();
    return Promise.all(mmchat.store.files(chat.history).map(async file => {
        const blob = await mmchat.store.read('pictures', file.path), {width, height} = await createImageBitmap(blob);
        return [blob.type, width, height]; })); }"""


def titles(page):
    return page.locator("#list li button:first-child")


def toasts(page):
    """The sentences that are shown, in one element."""
    return page.locator(".toast-body.warning")


def export(page, kind="Save JSON"):
    with page.expect_download() as download:
        page.get_by_role("button", name=kind, exact=True).click()
    return download.value.path().read_text(encoding="utf-8")


def load(page, path):
    page.locator("#list input[type=file]").set_input_files(str(path))


def conversation(photo, **changes):
    """A conversation as the page exports it."""
    picture = "data:image/jpeg;base64," + base64.b64encode(photo.read_bytes()).decode()
    turns = [
        {"role": "user", "parts": [{"picture": picture, "name": r"Sign [1] \o/"}, {"text": TRICKY}, {"text": ""}]},
        {
            "role": "assistant",
            "parts": [{"text": "- 7 tokens"}],
            "metadata": {"title": "Details", "log": "7 tokens", "duration": 1.5, "status": "done"},
        },
        {
            "role": "assistant",
            "parts": [{"text": "Yes --> no."}],
            "options": [
                {"label": "‹ 1/2", "value": '{"at": 0, "all": ["a", "-->"]}'},
                {"label": "2/2 ›", "value": "long " * 99_000},
            ],
            "thumb": "Dislike",
        },
    ]
    return {"format": "mmchat", "version": 1, "title": " A <b>title</b>\n  of two lines", "turns": turns, **changes}


def test_a_conversation_goes_on_after_a_reload_even_if_its_upload_is_gone(page, photo, engine, monkeypatch):
    asked = record_replies(engine, monkeypatch)
    show(page, photo)
    ask(page, "Who is this?")
    finished(page)
    said = answers(page).last.inner_text()
    expect(titles(page)).to_have_text(["Who is this?"])
    (uploaded,) = asked[-1][-1].images
    uploaded.unlink()
    reload(page)
    expect(answers(page).last).to_have_text(said)
    expect(page.locator("#chat .user img")).to_have_count(1)
    ask(page, "Is there a dog?")
    expect(answers(page)).to_have_count(2)
    finished(page)
    (sent_again,) = asked[-1][0].images
    assert len(asked[-1]) == 3 and sent_again != uploaded
    expect(titles(page)).to_have_count(1)
    sent_again.unlink()  # while the page stays open
    ask(page, "Is there a flag?")
    finished(page)
    assert len(asked[-1]) == 5 and len(asked[-1][0].images) == 1
    asked[-1][0].images[0].unlink()
    page.route("**/gradio_api/upload*", lambda route: route.abort())
    ask(page, "Is there a bird?")
    expect(toasts(page)).to_contain_text("could not be sent to the server again")
    finished(page)
    assert len(asked[-1]) == 7 and not asked[-1][0].images
    reload(page)
    expect(toasts(page)).to_contain_text("could not be sent to the server again")
    expect(answers(page)).to_have_count(4)
    page.unroute("**/gradio_api/upload*")
    ask(page, "Is there a fish?")
    expect(answers(page)).to_have_count(5)
    finished(page)
    assert len(asked[-1]) == 9 and len(asked[-1][0].images) == 1  # the browser still has it
    asked[-1][0].images[0].unlink()
    page.wait_for_timeout(300)
    page.evaluate(CLEAR_COPIES)
    ask(page, "Is there a cat?")
    expect(toasts(page)).to_contain_text("A picture of this conversation is gone")
    expect(page.locator("#chat .user").first).to_contain_text("(Picture 1 is gone.)")


@pytest.fixture
def told(monkeypatch):
    """Every warning that the page was sent: a toast is gone after ten seconds, however long the answer takes."""
    sentences, warn = [], gr.Warning
    monkeypatch.setattr(gr, "Warning", lambda sentence: (sentences.append(sentence), warn(sentence)))
    return sentences


def expect_told(page, told, *sentences):
    """Waits until this many warnings were sent, and a moment for another one."""
    deadline = time.monotonic() + PATIENCE / 1000
    while len(told) < len(sentences) and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    page.wait_for_timeout(500)
    assert told == list(sentences)


def test_what_the_browser_cannot_keep_is_said_once(browser, address, photo, tmp_path, told):
    context = browser.new_context(viewport=DESKTOP)  # whose storage nobody has used
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.goto(address)
    question(page).wait_for()
    quota = context.new_cdp_session(page)
    quota.send("Storage.overrideQuotaForOrigin", {"origin": address, "quotaSize": 1})
    ask(page, "Name a color.")
    expect(toasts(page)).to_contain_text("storage is full: this conversation is not saved")
    finished(page)
    (tmp_path / "given.json").write_text(json.dumps(conversation(photo)))
    load(page, tmp_path / "given.json")
    expect_told(page, told, NOTICES["full"], NOTICES["full"])
    expect(titles(page)).to_have_count(0)
    quota.send("Storage.overrideQuotaForOrigin", {"origin": address})
    Image.open(photo).save(tmp_path / "scan.tiff")  # browsers cannot shrink it
    show(page, tmp_path / "scan.tiff")
    ask(page, "Who is this?")
    finished(page)
    expect_told(page, told, NOTICES["full"], NOTICES["full"], NOTICES["not_kept"])
    expect(titles(page)).to_have_text(["Name a color."])
    context.close()


def test_a_browser_that_keeps_nothing_is_told(browser, address, told):
    context = browser.new_context(viewport=DESKTOP)
    context.set_default_timeout(PATIENCE)
    context.add_init_script("indexedDB.open = () => { throw new DOMException('denied', 'SecurityError'); }")
    page = context.new_page()
    page.goto(address)
    question(page).wait_for()
    ask(page, "Name a color.")
    expect(toasts(page)).to_contain_text("a reload loses this conversation")
    finished(page)
    ask(page, "Name an animal.")
    expect(answers(page)).to_have_count(2)
    finished(page)
    expect_told(page, told, NOTICES["nothing_kept"])
    context.close()


def test_conversations_are_listed_found_renamed_and_deleted(page):
    page.on("dialog", lambda dialog: dialog.accept("Trains and boats" if dialog.type == "prompt" else None))
    texts = []
    for count, text in enumerate(("What is a boat?", "What is the capital of France?"), start=1):
        page.get_by_role("button", name="New chat", exact=True).click()
        page.wait_for_timeout(300)  # a person is slower than the box is emptied
        expect(page.locator("#chat .user")).to_have_count(0)
        ask(page, text)
        finished(page)
        expect(titles(page)).to_have_count(count)
        texts.append(answers(page).last.inner_text())
    other = f"What is a boat? {texts[0]}".lower()
    word_of_answer = next(word for word in texts[1].split() if word.isalpha() and word.lower() not in other)
    page.get_by_label("Search conversations").fill("capital")
    expect(titles(page)).to_have_text(["What is the capital of France?"])
    page.get_by_label("Search conversations").fill(word_of_answer)
    expect(titles(page)).to_have_text(["What is the capital of France?"])
    page.get_by_label("Search conversations").fill("no such word")
    expect(page.locator("#list")).to_contain_text("No conversation matches.")
    page.get_by_label("Search conversations").fill("")
    page.get_by_role("button", name="Rename What is a boat?").click()
    expect(titles(page)).to_have_text(["What is the capital of France?", "Trains and boats"])
    page.get_by_role("button", name="Open Trains and boats").click()
    expect(page.locator("#chat .user .prose")).to_have_text("What is a boat?")
    page.get_by_role("button", name="Delete Trains and boats").click()
    expect(titles(page)).to_have_count(1)
    expect(page.locator("#chat .user")).to_have_count(0)
    reload(page)
    expect(titles(page)).to_have_text(["What is the capital of France?"])


def test_export_and_import_lose_nothing(page, photo, tmp_path):
    path = tmp_path / "given.json"
    path.write_text(json.dumps(conversation(photo)))
    load(page, path)
    expect(titles(page)).to_have_text(["A <b>title</b> of two lines"])  # text, not HTML
    expect(page.locator("#chat .user img[src*='gradio_api/file']")).to_have_count(1)  # the text names another one
    assert json.loads(export(page)) == conversation(photo)
    path = tmp_path / "saved.md"
    path.write_text(export(page, "Save"), encoding="utf-8")
    load(page, path)
    expect(titles(page)).to_have_count(2)
    page.wait_for_timeout(1_000)
    assert json.loads(export(page)) == conversation(photo)
    long = conversation(photo, title="Long", turns=[{"role": "user", "parts": [{"text": "Hi"}]}] * 2_000)
    page.evaluate(
        "text => mmchat.transfer.read(new File([text], 'long.json'))", json.dumps(long)
    )  # to draw it takes long
    expect(titles(page).first).to_have_text("Long")


def test_the_browser_keeps_small_copies_which_can_be_exported_and_imported(page, small_picture, tmp_path):
    small_picture.save(tmp_path / "small.bmp")  # the server sends it without its type
    noise = np.random.default_rng(0).integers(0, 255, (1500, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.jpg")
    for name in ("small.bmp", "large.jpg"):
        show(page, tmp_path / name)
    ask(page, "What is this?")
    finished(page)
    expect(titles(page)).to_have_count(1)
    copies = [["image/bmp", 96, 64], ["image/jpeg", 1024, 768]]
    assert page.evaluate(COPIES) == copies
    (tmp_path / "saved.json").write_text(export(page))
    load(page, tmp_path / "saved.json")
    expect(titles(page)).to_have_count(2)
    assert page.evaluate(COPIES) == copies


def test_a_file_of_somebody_else_is_refused_in_words(page, photo, tmp_path):
    page.on("dialog", lambda dialog: pytest.fail("a script ran"))
    turn = {"role": "user", "parts": [{"text": "Hi"}]}
    component = {"type": "component", "component": "html", "value": "<script>alert(1)</script>"}
    svg, large = "data:image/svg+xml;base64,PHN2Zz48L3N2Zz4=", "data:image/png;base64," + "A" * 14_000_000
    hostile = [
        "This is text.",
        "{",
        "[]",
        json.dumps(conversation(photo, format="other")),
        json.dumps(conversation(photo, version=99)),
        json.dumps(conversation(photo, turns=[])),
        json.dumps(conversation(photo, turns=[turn] * 20_000)),
        json.dumps(conversation(photo, turns=[{**turn, "role": "system"}])),
        json.dumps(conversation(photo, turns=[{**turn, "parts": [component]}])),
        json.dumps(conversation(photo, turns=[{**turn, "parts": [{"picture": svg}]}])),
        json.dumps(conversation(photo, turns=[{**turn, "parts": [{"picture": large}]}])),
        json.dumps(conversation(photo, turns=[{**turn, "parts": [{"picture": "http://127.0.0.1:1/x.png"}]}])),
        json.dumps(conversation(photo, turns=[{**turn, "parts": [{"picture": "/etc/passwd"}]}])),
        json.dumps(conversation(photo, turns=[{**turn, "parts": [{"text": "x" * 300_000}]}])),
        json.dumps(conversation(photo, turns=[{**turn, "metadata": {"title": {"a": 1}}}])),
        "# title\n\n## User\n<!-- mmchat {broken -->\nHi\n",
    ]
    for number, content in enumerate(hostile):
        path = tmp_path / f"{number}.json"
        path.write_text(content)
        load(page, path)
        expect(page.locator(".toast-body").last).to_contain_text("not a conversation that was exported here")
        page.locator(".toast-close").last.click()
        expect(page.locator(".toast-body")).to_have_count(0)
    refused = page.evaluate(
        """text => mmchat.transfer.read(Object.defineProperty(new File([text], 'large.json'), 'size', {value: 1e8 + 1}))
        .catch(error => error.message)""",
        json.dumps(conversation(photo)),
    )
    assert refused == "size" and titles(page).count() == 0


def test_what_an_imported_conversation_says_is_not_run(page, photo, tmp_path):
    page.on("dialog", lambda dialog: pytest.fail("a script ran"))
    script = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    given = conversation(photo, title=script)
    shown, folded, answer = given["turns"]
    shown["parts"][0]["name"] = script
    folded["metadata"].update(title=script, log=script)
    answer["parts"] = [{"text": script + " Harmless."}]
    for option in answer["options"]:
        option["label"] = script
    path = tmp_path / "given.json"
    path.write_text(json.dumps(given))
    load(page, path)
    expect(answers(page).last).to_contain_text("Harmless.")
    expect(titles(page)).to_have_text([script])
    expect(page.locator("#chat .option")).to_have_text([script] * 2)
    expect(page.locator("#chat .thought-group .duration")).to_contain_text(script)
    page.wait_for_timeout(1_000)
