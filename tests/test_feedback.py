"""Feedback that trains: what is stored, how, and that training learns it."""

from __future__ import annotations

import json
import threading

import gradio as gr
import pytest
from PIL import Image

from mmchat import BadInput, Message
from mmchat.serving import feedback
from mmchat.serving import page as ui
from mmchat.serving.feedback import FeedbackStore
from mmchat.serving.page.thumbs import ThumbsPage
from mmchat.serving.rate_limit import RateLimit
from mmchat.serving.serve import feedback_store
from mmchat.training.data.llava_json import read_conversations

QUESTION = "What do you see here?"


def turn(picture=None, question=QUESTION, answer="A dog."):
    return [Message("user", question, [picture] if picture else []), Message("assistant", answer)]


def test_a_better_answer_is_a_training_example(tmp_path, photo):
    store = FeedbackStore(tmp_path)
    store.add(turn(photo), liked=False, better="An astronaut.")
    (conversation,) = read_conversations(tmp_path / "conversations.json")
    question, answer = conversation.messages
    assert question.text == QUESTION and answer.text == "An astronaut."
    with Image.open(tmp_path / "pictures" / question.images[0]) as stored:
        assert stored.format == "JPEG" and not stored.getexif()


def test_liked_answers_train_and_disliked_ones_do_not(tmp_path, photo):
    store = FeedbackStore(tmp_path)
    store.add(turn(photo, answer="A woman."), liked=True)
    store.add(turn(question="Who are you?"), liked=False)
    assert [c.messages[-1].text for c in read_conversations(tmp_path / "conversations.json")] == ["A woman."]
    assert [c.messages[-1].text for c in read_conversations(tmp_path / "disliked.json")] == ["A dog."]


def test_only_the_last_question_and_its_picture_are_stored(tmp_path, photo):
    messages = [*turn(photo, "My secret?"), *turn(question="What color is it?")]
    FeedbackStore(tmp_path).add(messages, liked=True)
    text = (tmp_path / "conversations.json").read_text()
    assert "secret" not in text and len(json.loads(text)) == 1 and json.loads(text)[0]["image"]


def test_several_pictures_are_stored_in_their_order(tmp_path, photo):
    shown = [photo, photo.with_name("bus.jpg"), photo]
    messages = [Message("user", "Which one shows a bus?", shown), Message("assistant", "The first one.")]
    FeedbackStore(tmp_path).add(messages, liked=False, better="Picture 2.")
    (conversation,) = read_conversations(tmp_path / "conversations.json")
    question, answer = conversation.messages
    assert (question.text, answer.text) == ("Which one shows a bus?", "Picture 2.")
    first, second, third = question.images
    assert first == third != second and all((tmp_path / "pictures" / name).is_file() for name in question.images)


def test_the_newest_feedback_on_a_question_counts(tmp_path, photo):
    store = FeedbackStore(tmp_path)
    for better in ("One.", "Two."):
        store.add(turn(photo), liked=False, better=better)
    assert [c.messages[-1].text for c in read_conversations(tmp_path / "conversations.json")] == ["Two."]


def test_hostile_text_cannot_spoil_the_file(tmp_path):
    FeedbackStore(tmp_path).add(turn(question='<image>\ud800 "},]\n\0'), liked=False, better="<image>\udfff ok")
    (conversation,) = read_conversations(tmp_path / "conversations.json")
    assert not conversation.images and conversation.messages[-1].text.endswith("ok")


@pytest.mark.parametrize("messages", [[], turn()[:1], turn(answer=" ")])
def test_what_cannot_train_is_refused(tmp_path, messages):
    with pytest.raises(BadInput):
        FeedbackStore(tmp_path).add(messages, liked=True)


def test_the_folder_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(feedback, "MAX_ENTRIES", 2)
    store = FeedbackStore(tmp_path)
    for number in range(2):
        store.add(turn(question=f"{number}?"), liked=True)
    with pytest.raises(BadInput, match="all the feedback"):
        store.add(turn(question="3?"), liked=True)
    with pytest.raises(BadInput, match="under"):
        store.add(turn(), liked=False, better="x" * 5000)


def test_feedback_counts_for_the_rate_limit(tmp_path):
    thumbs = ThumbsPage(FeedbackStore(tmp_path), ui.Page(None, RateLimit(1)).admit)
    thumbs.correct("A cat.", turn())
    said = [{"role": message.role, "content": message.text} for message in turn(question="Who are you?")]
    liked = gr.LikeData(None, {"index": 1, "value": "A dog.", "liked": True})
    for one_too_many in (lambda: thumbs.correct("A cow.", turn()), lambda: thumbs.rate(said, liked)):
        with pytest.raises(gr.Error, match="more than 1 question per minute"):
            one_too_many()
    (conversation,) = read_conversations(tmp_path / "conversations.json")
    assert conversation.messages[-1].text == "A cat."


def test_it_is_stored_only_where_the_operator_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.delenv("MMCHAT_FEEDBACK", raising=False)
    assert feedback_store() is None
    monkeypatch.setenv("MMCHAT_FEEDBACK", str(tmp_path / "stored"))
    assert feedback_store().folder == tmp_path / "stored"


def test_many_at_once_lose_nothing(tmp_path):
    stores = [FeedbackStore(tmp_path) for _ in range(4)]
    threads = [
        threading.Thread(target=lambda n=n: [stores[n].add(turn(question=f"{n} {k}"), True) for k in range(5)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(read_conversations(tmp_path / "conversations.json"))) == 20
    assert not list(tmp_path.glob("**/*.part"))
