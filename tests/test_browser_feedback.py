"""Thumbs and better answers in a browser, with the real models, and what is stored of them."""

from __future__ import annotations

import json

import pytest

from mmchat.serving import feedback
from mmchat.serving import page as ui
from mmchat.training.data.llava_json import read_conversations
from tests.browsing import ask, expect, finished, show
from tests.conftest import ROOT
from tests.raw import endpoints, served, upload

pytestmark = pytest.mark.browser


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


def test_a_thumb_up_stores_the_answer(page, folder):
    ask(page, "Name a color.")
    finished(page)
    page.get_by_role("button", name="Like", exact=True).last.click()
    page.get_by_text("Your feedback is stored").first.wait_for()
    assert list(read_conversations(folder / "conversations.json"))[-1].messages[0].text == "Name a color."
    expect(page.get_by_label("A better answer")).to_have_count(0)


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


def test_without_a_folder_there_are_no_thumbs(engine, monkeypatch):
    from mmchat.serving.serve import feedback_store

    monkeypatch.delenv("MMCHAT_FEEDBACK", raising=False)
    assert feedback_store() is None
    config = ui.build(engine, ROOT / "examples").get_config_file()
    (chat,) = [part["props"] for part in config["components"] if part["type"] == "chatbot"]
    assert not chat.get("feedback_options")
    assert not {"rate", "correct"} & {str(event["api_name"]) for event in config["dependencies"]}
