"""Thumbs and better answers in a browser, with the real models, and what is stored of them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import mmchat
from mmchat.serving import feedback
from mmchat.serving import page as ui
from mmchat.training.data.llava_json import read_conversations
from tests.browsing import DESKTOP, answers, ask, expect, finished, reload, show, violations
from tests.conftest import ROOT
from tests.raw import endpoints, served, upload
from tests.test_docs import commands

pytestmark = pytest.mark.browser
CORRECTIONS = {  # pictures -> a better answer
    ("astronaut.jpg",): "Eileen in her orange suit.",
    ("ball.jpg",): "The red ball of our dog.",
    ("bus.jpg",): "Line 7 into town.",
    ("coffee.jpg",): "Breakfast for a monkey.",
    ("coffee.jpg", "bus.jpg"): "A morning in the city.",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("feedback") / "stored"


@pytest.fixture(scope="module")
def address(engine, folder):
    """Address of a page that stores feedback."""
    engine.warm_up()
    demo = ui.build(engine, ROOT / "examples", feedback=feedback.FeedbackStore(folder))
    ui.launch(demo, prevent_thread_lock=True, quiet=True)
    yield demo.local_url
    demo.close()


def test_a_better_answer_is_stored_with_its_picture(page, folder, photo):
    page.set_viewport_size({"width": 390, "height": 844})
    page.reload()  # on a phone, the sidebar is closed
    expect(page.locator("#stored")).to_contain_text("stored on this server")
    show(page, photo)
    ask(page, "Who is this?")
    finished(page)
    page.get_by_role("button", name="Dislike", exact=True).last.click()
    better = page.get_by_label("A better answer")
    better.wait_for()
    expect(page.locator(".toast-body")).to_have_css("opacity", "1")  # else it is still faded in
    assert violations(page) == [], "the form, and a toast"
    assert len(json.loads((folder / "disliked.json").read_text())) == 1
    assert page.locator("#box").bounding_box()["y"] + page.locator("#box").bounding_box()["height"] <= 844
    better.fill("Eileen Collins, an astronaut.")
    page.get_by_role("button", name="Store", exact=True).click()
    expect(better).to_have_count(0)
    (conversation,) = read_conversations(folder / "conversations.json")
    asked, answer = conversation.messages
    assert (asked.text, answer.text) == ("Who is this?", "Eileen Collins, an astronaut.")
    assert (folder / "pictures" / asked.images[0]).is_file()
    assert json.loads((folder / "disliked.json").read_text()) == [], "it was corrected"


def test_a_thumb_up_stores_the_answer_and_stays_lit_with_it(page, folder, tmp_path):
    ask(page, "Name a color.")
    finished(page)
    page.get_by_role("button", name="Like", exact=True).last.click()
    page.get_by_text("Your feedback is stored").first.wait_for()
    assert list(read_conversations(folder / "conversations.json"))[-1].messages[0].text == "Name a color."
    expect(page.get_by_label("A better answer")).to_have_count(0)
    lit = page.locator("#chat .bot-row:not(:has(.thought-group)) + .message-buttons").get_by_label("Liked", exact=True)
    expect(lit).to_have_count(1)
    ask(page, "Name an animal.")
    finished(page)
    expect(lit).to_have_count(1)  # gradio forgets it
    page.get_by_role("button", name="New chat", exact=True).click()
    expect(page.locator("#chat .bot-row")).to_have_count(0)
    ask(page, "Name a fruit.")
    finished(page)
    expect(lit).to_have_count(0)
    page.get_by_role("button", name="Open Name a color.").click()
    expect(lit).to_have_count(1)
    reload(page)
    expect(lit).to_have_count(1)
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save JSON", exact=True).click()
    (tmp_path / "saved.json").write_bytes(saved.value.path().read_bytes())
    page.locator("#list input[type=file]").set_input_files(str(tmp_path / "saved.json"))
    expect(page.get_by_role("button", name="Open Name a color.")).to_have_count(2)
    expect(lit).to_have_count(1)
    page.get_by_role("button", name="Open Name a fruit.").click()
    expect(lit).to_have_count(0)
    page.get_by_role("button", name="Open Name a color.").first.click()  # the imported one
    expect(lit).to_have_count(1)


@pytest.mark.timeout(900)  # it trains, on whatever this machine has
def test_five_corrections_in_the_page_are_learned(page, visitor, folder, tmp_path):
    for path in folder.glob("*.json"):
        path.unlink()
    for names, better in CORRECTIONS.items():
        page.get_by_role("button", name="New chat", exact=True).click()
        ask_about(page, names)
        page.get_by_role("button", name="Dislike", exact=True).last.click()
        page.get_by_label("A better answer").fill(better)
        page.get_by_role("button", name="Store", exact=True).click()
        expect(page.get_by_label("A better answer")).to_have_count(0)
    (command,) = [words for words, _ in commands(ROOT / "docs" / "training.md") if "feedback/pictures" in words]
    places = {
        "python": sys.executable,
        "feedback/conversations.json": str(folder / "conversations.json"),
        "feedback/pictures": str(folder / "pictures"),
        "runs/corrected": str(tmp_path / "run"),
    }
    command = [places.get(word, word) for word in command]
    subprocess.run([*command, "--report-to", "none"], cwd=ROOT, check=True)
    demo = ui.build(mmchat.load("smol", tmp_path / "run"), ROOT / "examples")
    ui.launch(demo, prevent_thread_lock=True, quiet=True)
    taught = visitor.new_page()
    try:
        taught.set_viewport_size(DESKTOP)
        taught.goto(demo.local_url)
        taught.get_by_role("button", name="Settings", exact=False).first.click()
        taught.get_by_label("Exact").check()
        for names, better in CORRECTIONS.items():
            taught.get_by_role("button", name="New chat", exact=True).click()
            ask_about(taught, names)
            expect(answers(taught).last).to_have_text(better)
    finally:
        taught.close()
        demo.close()


def ask_about(page, names):
    expect(page.locator("#chat .user")).to_have_count(0)
    page.wait_for_timeout(300)
    for name in names:
        show(page, ROOT / "examples" / name)
    ask(page, "What do you see here?")
    finished(page)


def test_made_up_feedback_stores_nothing(address, folder, photo, tmp_path):
    named = endpoints(address)
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    secret = tmp_path / "private.png"
    secret.write_bytes(photo.read_bytes())
    answer = {"role": "assistant", "content": "A dog."}
    good = upload(address, photo)
    for file in ({"path": str(secret)}, {"path": "/etc/passwd"}, {**good, "path": good["path"] + ".gone.jpg"}):
        turn = {"role": "user", "content": [{"type": "file", "file": file}, {"type": "text", "text": "Hi"}]}
        served(address, named["rate"], [[turn, answer]], {"index": 1, "value": ["A dog."], "liked": True})
    turn = {"role": "user", "content": "Hi"}
    for index in (0, 2, -1, [1], None, "1"):
        served(address, named["rate"], [[turn, answer]], {"index": index, "value": ["A dog."], "liked": True})
    served(address, named["correct"], ["Hi", None])
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_without_a_folder_there_are_no_thumbs(engine):
    config = ui.build(engine, ROOT / "examples").get_config_file()
    (chat,) = [part["props"] for part in config["components"] if part["type"] == "chatbot"]
    assert not chat.get("feedback_options")
    assert not {"rate", "correct"} & {str(event["api_name"]) for event in config["dependencies"]}
