"""What operators switch on: answer cache, content filter, metrics, logs."""

from __future__ import annotations

import io
import json
import logging
import socket
from argparse import Namespace
from functools import partial
from types import SimpleNamespace

import gradio
import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from starlette.applications import Starlette
from starlette.testclient import TestClient

from mmchat import BadInput, Message, MmchatError, SamplingOptions
from mmchat.errors import WeightsError
from mmchat.serving import filtering, serve
from mmchat.serving import page as ui
from mmchat.serving.caching import CachedText, CachingEngine
from mmchat.serving.filtering import ANSWER_HELD, CONTINUATION_HELD, QUESTION_HELD, FilteringEngine, load_filter
from mmchat.serving.json_log import JsonFormatter
from mmchat.serving.metrics import Metrics
from mmchat.serving.middleware import build_middleware
from mmchat.serving.observing import ObservedEngine, log, tell_refusal
from mmchat.serving.openai_api import OpenAiApi
from mmchat.serving.opening import Opening
from mmchat.serving.rate_limit import RateLimit
from mmchat.serving.request_queue import Gate
from tests.conftest import ROOT, SPEECH

GREEDY = SamplingOptions(temperature=0, max_new_tokens=8)
COLORS = [Message("user", "Name three colors.")]


class Said:
    """An engine that says given pieces, and counts."""

    def __init__(self, *pieces):
        self.pieces, self.asked, self.messages = pieces, 0, None

    def reply(self, messages, options=None, notify=None):
        self.asked, self.messages = self.asked + 1, list(messages)
        yield from self.pieces

    def rewrite(self, question, draft, options=None):
        yield from self.pieces


def test_the_same_greedy_question_comes_from_the_cache(engine, photo):
    cached = CachingEngine(engine, 2)
    question = [Message("user", "Describe the image.", [photo])]
    first, again = list(cached.reply(question, GREEDY)), list(cached.reply(question, GREEDY))
    assert again == first and len(first) > 3
    assert all(isinstance(piece, CachedText) for piece in again)
    assert not any(isinstance(piece, CachedText) for piece in first)
    other = [Message("user", "Describe the image.", [photo.with_name("coffee.jpg")])]
    assert not isinstance(next(cached.reply(other, GREEDY)), CachedText)
    assert cached.count_tokens(question, "A.")[0] > 10  # what only some engines have is passed on


def test_the_details_of_an_answer_say_that_it_comes_from_the_cache():
    page = ui.Page(FilteringEngine(CachingEngine(Said("It is ", "a cat."), 2), lambda text: False))
    exact = [0.0, 16, False, 1, 1, True, None, ""]  # the settings of a greedy answer
    told = []
    for _ in range(2):
        visit, question = ui.Visit(), {"role": "user", "content": [{"type": "text", "text": "What is it?"}]}
        shown = [value for value in page.reply([question], visit, visit.request(), *exact) if isinstance(value, list)]
        _, folded, answer = shown[-1]
        assert answer["content"] == "It is a cat."
        told.append("From the cache" in folded["content"])
    assert told == [False, True]


def test_the_cache_is_bounded_and_leaves_chance_and_stopped_answers_alone():
    engine = Said("a", "b")
    cached = CachingEngine(engine, 2)
    for text in ("1", "2", "1", "3", "1", "2"):  # 2 was forgotten for 3
        list(cached.reply([Message("user", text)], GREEDY))
    assert engine.asked == 4
    for _ in range(2):
        list(cached.reply(COLORS, SamplingOptions(temperature=0.5)))
    assert engine.asked == 6
    stopped = cached.reply([Message("user", "4")], GREEDY)
    next(stopped)
    stopped.close()
    list(cached.reply([Message("user", "4")], GREEDY))
    assert engine.asked == 8


def never(text):
    return "turnip" in text.lower() or "two turtle doves" in text.lower()


def broken(text):
    if text != "Hello.":
        raise RuntimeError(text)
    return False


def filtered(*pieces, is_held=never, holds=lambda: None):
    engine = Said(*pieces)
    return engine, FilteringEngine(engine, is_held, holds)


def test_held_back_questions_do_not_reach_the_engine():
    times: list[str] = []
    engine, held = filtered("Yes.", holds=lambda: times.append("held"))
    assert list(held.reply([Message("user", "A turnip?")])) == [QUESTION_HELD] and not engine.asked
    later = [Message("user", "A turnip?"), Message("assistant", QUESTION_HELD), *COLORS]
    assert list(held.reply(later)) == ["Yes."] and engine.messages == COLORS
    assert list(held.rewrite("x", "turnip")) == [ANSWER_HELD] and len(times) == 2


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_no_held_back_word_is_ever_shown(size):
    def split(text):
        return [text[start : start + size] for start in range(0, len(text), size)]

    _, held = filtered(*split("The farmer has a big field, and in it there grows a turnip and more of it."))
    shown = list(held.reply(COLORS))
    assert shown[-1] in (CONTINUATION_HELD, ANSWER_HELD) and "turn" not in "".join(shown[:-1])
    _, held = filtered(*split("On the second day of it all my true love gave to me two turtle doves and a partridge."))
    assert "two" not in "".join(list(held.reply(COLORS))[:-1])
    harmless = "A plain answer of a good number of words, which stays as it is.\n\n1. One\n2. Two"
    _, held = filtered(*split(harmless))
    assert "".join(held.reply(COLORS)) == harmless


def test_a_filter_that_fails_lets_nothing_through_and_logs_no_words(caplog):
    _, held = filtered("A secret answer.", is_held=broken)
    assert list(held.reply(COLORS)) == [QUESTION_HELD]
    assert "colors" not in caplog.text and "RuntimeError" in caplog.text


def test_the_word_list_is_the_default(engine):
    is_held = load_filter("1")
    assert is_held("What the fuck?") and is_held("sh1t") and not is_held("A glass in Scunthorpe.")
    assert load_filter("tests.test_operating:never") is never
    for wrong in ("nothing", "no.such:thing", "mmchat.serving.filtering:nothing"):
        with pytest.raises(BadInput, match="MMCHAT_FILTER"):
            load_filter(wrong)
    expected = "".join(engine.reply(COLORS, GREEDY))
    assert "".join(FilteringEngine(engine, is_held).reply(COLORS, GREEDY)) == expected


def test_settings_equip_an_engine(monkeypatch):
    engine = Said("a")
    for name in ("MMCHAT_ANSWER_CACHE", "MMCHAT_FILTER"):
        monkeypatch.delenv(name, raising=False)
    assert type(build_middleware()(engine)) is CachingEngine  # all else is off by default
    monkeypatch.setenv("MMCHAT_ANSWER_CACHE", "0")
    assert build_middleware()(engine) is engine
    monkeypatch.setenv("MMCHAT_ANSWER_CACHE", "8")
    monkeypatch.setenv("MMCHAT_FILTER", "1")
    wrapped = build_middleware()(engine)
    assert isinstance(wrapped, FilteringEngine) and isinstance(wrapped.engine, CachingEngine)
    pieces = [list(wrapped.reply(COLORS, GREEDY)) for _ in range(2)]
    assert pieces[0] == pieces[1] == ["a"] and engine.asked == 1
    monkeypatch.setenv("MMCHAT_ANSWER_CACHE", "many")
    with pytest.raises(BadInput, match="whole number"):
        build_middleware()
    assert filtering.DEFAULT


def serve_until_launch(monkeypatch, launched, rate_limit="0"):
    """Runs `mmchat serve` up to the launch, which gets the routes beside the page."""

    def launch(demo, app_kwargs, **_):
        launched(app_kwargs["routes"])
        raise OSError  # nothing is served here

    monkeypatch.setattr(ui, "launch", launch)
    options = {"preset": "smol", "weights": None, "server": None, "host": None, "port": None}
    with pytest.raises(MmchatError, match="address"):
        serve.serve(SimpleNamespace(rate_limit=rate_limit, metrics=False, api=False, **options))


@pytest.mark.parametrize(
    ("switched_on", "paths"),
    [
        ({}, {"/healthz"}),
        ({"MMCHAT_API": "1"}, {"/healthz", "/v1/models", "/v1/models/{name:path}", "/v1/chat/completions"}),
        ({"MMCHAT_METRICS": "1"}, {"/healthz", "/metrics"}),
    ],
)
def test_the_api_and_the_metrics_are_there_only_if_they_are_switched_on(monkeypatch, switched_on, paths):
    for name in ("MMCHAT_API", "MMCHAT_METRICS", "MMCHAT_SIGN_IN", "MMCHAT_FEEDBACK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in switched_on.items():
        monkeypatch.setenv(name, value)
    served = []
    serve_until_launch(monkeypatch, lambda routes: served.extend(route.path for route in routes))
    assert set(served) == paths


def test_the_metrics_of_a_server_have_its_refusals(monkeypatch):
    for name in ("MMCHAT_API_KEY", "MMCHAT_SIGN_IN", "MMCHAT_FEEDBACK"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MMCHAT_API", "MMCHAT_METRICS"):
        monkeypatch.setenv(name, "1")
    said = []

    def ask(routes):
        program = TestClient(Starlette(routes=routes))
        said.extend(program.post("/v1/chat/completions", json={}).status_code for _ in range(2))
        said.append(program.get("/metrics").text)

    serve_until_launch(monkeypatch, ask, rate_limit="1")
    assert said[:2] == [400, 429] and 'mmchat_errors_total{kind="RateLimit"} 1.0' in said[2]


@pytest.mark.slow
def test_a_speech_model_that_is_named_is_checked_at_the_start(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    options = Namespace(server=None, preset="smol", weights=None, quantization="auto", speech=str(tmp_path))
    with pytest.raises(WeightsError, match="not a Whisper model"):
        serve.load_engine(options)


@pytest.mark.slow
def test_metrics_in_prometheus_format(engine, monkeypatch):
    monkeypatch.setenv("MMCHAT_ANSWER_CACHE", "8")
    monkeypatch.setenv("MMCHAT_FILTER", "tests.test_operating:never")
    metrics = Metrics(lambda: 3)
    observers = [metrics.observe]
    observed = build_middleware(observers)(engine)
    engine.warm_up()
    for _ in range(2):
        list(observed.reply(COLORS, GREEDY))
    # Greedy, for a sample may be so short that the filter, which withholds the last words, has read the whole answer.
    stopped = observed.reply([Message("user", "Count to one hundred.")], SamplingOptions(temperature=0))
    next(stopped)
    stopped.close()
    with pytest.raises(BadInput):
        list(observed.reply([Message("user", " ")], GREEDY))
    assert list(observed.reply([Message("user", "A turnip?")], GREEDY)) == [QUESTION_HELD]
    observed.transcribe(SPEECH)
    limit = RateLimit(2, refused=partial(tell_refusal, observers, "RateLimit"))
    gate = Gate(0, 0, partial(tell_refusal, observers, "Busy"))
    demo = ui.build(observed, ROOT / "examples", limit)
    routes = [metrics.route("secret"), *OpenAiApi(observed, "smol", gate, limit, "secret").routes()]
    ui.launch(demo, prevent_thread_lock=True, quiet=True, app_kwargs={"routes": routes})
    headers, asked = {"authorization": "Bearer secret"}, {"messages": [{"role": "user", "content": "Hi"}]}
    try:
        for code in ("server_busy", "server_busy", "rate_limit_exceeded"):
            answer = httpx.post(f"{demo.local_url}v1/chat/completions", json=asked, headers=headers)
            assert answer.json()["error"]["code"] == code
        with pytest.raises(AppError, match="questions per minute"):
            Client(demo.local_url, verbose=False).predict("Hi", None, api_name="/ask")
        assert not limit.admits("127.0.0.1")  # a batch waits, and is not refused
        assert httpx.get(f"{demo.local_url}metrics").status_code == 401
        text = httpx.get(f"{demo.local_url}metrics", headers=headers).text
    finally:
        demo.close()
    from prometheus_client.parser import text_string_to_metric_families

    values = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    for outcome, kind, cached, count in (
        ("answered", "reply", "false", 1),
        ("answered", "reply", "true", 1),
        ("stopped", "reply", "false", 1),
        ("failed", "reply", "false", 1),
        ("answered", "transcribe", "false", 1),
        ("held", "refusal", "false", 1),
        ("failed", "refusal", "false", 4),
    ):
        assert values["mmchat_questions_total", *sorted((outcome, kind, cached))] == count
    for error, count in (("BadInput", 1), ("Busy", 2), ("RateLimit", 2)):
        assert values["mmchat_errors_total", error] == count
    assert ("mmchat_errors_total", "held") not in values and values["mmchat_queue_length",] == 3
    assert values["mmchat_first_token_seconds_count",] == 2 and values["mmchat_speech_seconds_total",] > 5
    assert values["mmchat_tokens_per_second_count",] >= 1


def test_logs_are_json_without_words(engine, photo):
    sink = io.StringIO()
    handler = logging.StreamHandler(sink)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("mmchat.serving.observing")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        said = "".join(ObservedEngine(engine, [log]).reply([Message("user", "Zebra?", [photo])], GREEDY))
        try:
            raise ValueError("Zebra in a message")
        except ValueError:
            logger.exception("A request failed")
    finally:
        logger.removeHandler(handler)
    request, failure = map(json.loads, sink.getvalue().splitlines())
    assert request["outcome"] == "answered" and request["pictures"] == 1 and request["pieces"] > 0
    assert failure["error"] == "ValueError" and failure["at"]
    assert "Zebra" not in sink.getvalue() and said not in sink.getvalue()


def test_the_port_answers_until_the_page_does():
    opening = Opening(None, None)
    address = f"http://127.0.0.1:{opening.port}"
    page, health = httpx.get(address), httpx.get(f"{address}/healthz")
    assert page.status_code == 200 and "mmchat is starting" in page.text
    assert health.status_code == 503 and health.json() == {"status": "loading"}
    with pytest.raises(MmchatError, match="port is not available"):
        Opening(None, opening.port)
    opening.close()
    Opening(None, opening.port).close()


def test_another_program_takes_the_port_before_the_page_does():
    opening = Opening(None, None)
    taken = opening.port
    opening.close()
    with gradio.Blocks() as demo, socket.create_server(("127.0.0.1", taken)):
        start = partial(demo.launch, prevent_thread_lock=True, quiet=True)
        try:
            with pytest.raises(MmchatError, match="port is not available"):
                serve.open_page(start, taken, taken)
            serve.open_page(start, taken, None)
            assert demo.server_port != taken and httpx.get(demo.local_url).status_code == 200
        finally:
            demo.close()
