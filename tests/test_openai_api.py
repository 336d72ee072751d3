"""OpenAI's chat API beside the page, through OpenAI's own client, with the real models."""

from __future__ import annotations

import base64
import threading
from contextlib import contextmanager

import httpx
import openai
import pytest

from mmchat import BadInput, Message, SamplingOptions
from mmchat.serving import page as ui
from mmchat.serving.openai_api import OpenAiApi
from mmchat.serving.openai_request import until
from mmchat.serving.rate_limit import RateLimit
from mmchat.serving.remote import RemoteEngine
from mmchat.serving.request_queue import Busy, Gate, QueuedEngine
from mmchat.serving.routes import api_key, health
from tests.conftest import ROOT
from tests.test_docs import blocks

QUESTION = [{"role": "user", "content": "Name three colors of the rainbow."}]
GREEDY = {"model": "smol", "temperature": 0, "max_tokens": 12}


@contextmanager
def serving(engine, key=None, per_minute=0, gate=None):
    """The page and the API on a free port; yields the API's address."""
    gate, limit = gate or Gate(4, 16), RateLimit(per_minute)
    routes = [health(lambda: True), *OpenAiApi(engine, "smol", gate, limit, key).routes()]
    demo = ui.build(QueuedEngine(engine, gate), ROOT / "examples", limit)
    ui.launch(demo, prevent_thread_lock=True, quiet=True, app_kwargs={"routes": routes})
    try:
        yield f"{demo.local_url}v1"
    finally:
        demo.close()


@pytest.fixture(scope="module")
def served(engine):
    with serving(engine) as address:
        yield address


@pytest.fixture
def client(served):
    return openai.OpenAI(base_url=served, api_key="none", max_retries=0)


def picture(path):
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"},
    }


def test_models_are_listed(client, served):
    assert [model.id for model in client.models.list()] == ["smol"]
    assert client.models.retrieve("smol").owned_by == "mmchat"
    assert httpx.get(served.replace("/v1", "/healthz")).json() == {"status": "ok"}


def test_the_documented_example_runs(served, capsys):
    (code,) = [code for code in blocks(ROOT / "docs" / "deploying.md", "python") if "openai" in code]
    exec(compile(code.replace("http://127.0.0.1:7860/v1", served), "deploying.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_an_answer_with_usage(client, engine):
    answer = client.chat.completions.create(messages=QUESTION, **GREEDY)
    expected = "".join(engine.reply([Message("user", QUESTION[0]["content"])], SamplingOptions(0, max_new_tokens=12)))
    assert answer.choices[0].message.content == expected
    assert answer.usage.completion_tokens == 12 and answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens > 10


def test_a_stream_about_a_picture(client, engine, photo):
    content = [{"type": "text", "text": "Describe the image."}, picture(photo)]
    stream = client.chat.completions.create(
        messages=[{"role": "user", "content": content}], stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    events = list(stream)
    pieces = [event.choices[0].delta.content for event in events if event.choices and event.choices[0].delta.content]
    expected = engine.reply([Message("user", "Describe the image.", [photo])], SamplingOptions(0, max_new_tokens=12))
    assert len(pieces) > 3 and "".join(pieces) == "".join(expected)
    assert events[-1].usage.prompt_tokens > engine.model.tokens_per_image
    assert events[-2].choices[0].finish_reason in ("stop", "length")


def test_stop_texts_end_the_answer(client):
    whole = client.chat.completions.create(messages=QUESTION, **GREEDY).choices[0].message.content
    stop = whole[len(whole) // 2 :][:4]
    cut = client.chat.completions.create(messages=QUESTION, stop=stop, **GREEDY)
    assert cut.choices[0].message.content == whole[: whole.index(stop)] and cut.choices[0].finish_reason == "stop"
    assert "".join(until(iter(["a", "b", "EN", "c", "END", "d"]), ("END",))) == "abENc"
    assert "".join(until(iter(["a", "E", "N"]), ("END",))) == "aEN"


def test_a_seed_repeats_a_sampled_answer(client):
    options = {"model": "smol", "temperature": 1.5, "seed": 7, "max_tokens": 10, "messages": QUESTION}
    first, second = (client.chat.completions.create(**options).choices[0].message.content for _ in range(2))
    assert first == second


def test_closing_the_stream_stops_the_work(engine):
    closed, gate = threading.Event(), Gate(1, 0)

    class Watched:
        def reply(self, messages, options, notify):
            try:
                yield from engine.reply(messages, options, notify)
            finally:
                closed.set()

    with serving(Watched(), gate=gate) as address:
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        endless = {**GREEDY, "max_tokens": 2000, "messages": [{"role": "user", "content": "Count to one thousand."}]}
        stream = client.chat.completions.create(stream=True, **endless)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="Too many questions"):
            client.chat.completions.create(messages=QUESTION, **GREEDY)
        stream.close()
        assert closed.wait(30)
        patient = client.with_options(max_retries=6)  # the place is given back a moment later
        assert patient.chat.completions.create(messages=QUESTION, **GREEDY).choices[0].message.content


def test_the_page_and_a_remote_mmchat_share_the_line(served, engine, photo):
    remote = RemoteEngine(served)
    assert remote.model == "smol"
    text = Message("user", "What is the capital of France?")
    options = SamplingOptions(temperature=0, max_new_tokens=12)
    assert "".join(remote.reply([text], options)) == "".join(engine.reply([text], options))
    assert "".join(remote.reply([Message("user", "What is it?", [photo])], options))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"messages": []}, "needs a list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": " "}]}, "question"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "4000 characters"),
        ({"n": 2}, "One answer"),
        ({"temperature": "hot"}, "number"),
        ({"temperature": 9}, "temperature"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [1]}, "stop"),
        ({"tools": [{"type": "function"}]}, "not supported"),
    ],
)
def test_bad_requests_get_a_sentence(served, changed, sentence):
    answer = httpx.post(f"{served}/chat/completions", json={"messages": QUESTION, **GREEDY, **changed}, timeout=60)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert sentence in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("url", ["http://127.0.0.1/x.png", "file:///etc/passwd", "data:image/png;base64,!!", "/etc/x"])
def test_pictures_are_never_fetched(client, url):
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    with pytest.raises(openai.BadRequestError, match="data URL"):
        client.chat.completions.create(messages=[{"role": "user", "content": content}], **GREEDY)


def test_other_models_other_types_and_huge_bodies_are_refused(client, served):
    with pytest.raises(openai.NotFoundError, match="one model"):
        client.chat.completions.create(messages=QUESTION, model="gpt-4o")
    address = f"{served}/chat/completions"
    assert httpx.post(address, content="{}", headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.post(address, content="{", headers={"content-type": "application/json"}).status_code == 400
    assert httpx.post(address, json={"messages": "x" * (17 << 20)}, timeout=60).status_code == 413


def test_a_key_and_the_rate_limit(engine):
    with serving(engine, key="secret", per_minute=1) as address:
        with pytest.raises(openai.AuthenticationError, match="API key"):
            openai.OpenAI(base_url=address, api_key="wrong", max_retries=0).models.list()
        client = openai.OpenAI(base_url=address, api_key="secret", max_retries=0)
        assert client.chat.completions.create(messages=QUESTION, **GREEDY).choices
        with pytest.raises(openai.RateLimitError, match="per minute"):
            client.chat.completions.create(messages=QUESTION, **GREEDY)


def test_signing_in_without_a_key_is_refused(monkeypatch):
    monkeypatch.delenv("MMCHAT_API_KEY", raising=False)
    assert api_key(None) is None
    with pytest.raises(BadInput, match="MMCHAT_API_KEY"):
        api_key(("name", "password"))


def test_errors_show_no_insides(photo):
    class Broken:
        def reply(self, *_, **__):
            raise RuntimeError("/srv/secret/path")
            yield

    with serving(Broken()) as address:
        answer = httpx.post(f"{address}/chat/completions", json={"messages": QUESTION})
        assert answer.status_code == 500 and "secret" not in answer.text and "wrong on my side" in answer.text


def test_the_gate_admits_in_order():
    gate = Gate(1, 1)
    first = gate.join()
    second = gate.join()
    with pytest.raises(Busy):
        gate.join()
    assert first.is_set() and not second.is_set() and gate.waiting == 1
    gate.leave(first)
    assert second.is_set() and gate.waiting == 0
    gate.leave(second)
    with gate.turn():
        pass
