"""Model servers: transformers serving an exported model, and servers that fail."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmchat import BadInput, Message, MmchatError, SamplingOptions
from mmchat.checkpoints.llava_export import export_llava
from mmchat.engine import LocalEngine
from mmchat.presets import PRESETS
from mmchat.serving.remote import RemoteEngine
from mmchat.training.recipe import Recipe
from mmchat.training.run import train
from tests.close import certain_answer
from tests.conftest import ROOT

OPTIONS = SamplingOptions(temperature=0, max_new_tokens=10)


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    """A tiny exported model on ``transformers serve``: its address, its name there, and our weights."""
    folder = tmp_path_factory.mktemp("served")
    recipe = Recipe(
        train=[str(tiny / "train.json")],
        features=str(tiny / "features-patches"),
        preset="phi3-patches",
        projector="llava",
        intermediate_size=64,
        out=str(folder / "weights"),
        max_steps=20,
        lr=1e-2,
        report_to=["none"],
    )
    train(recipe)
    export_llava(folder / "weights", folder / "llava", PRESETS["phi3-patches"], torch.float32)
    (folder / "hf" / "hub").mkdir(parents=True)
    port = _free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder / "llava"), "--device", "cpu"]
    server = subprocess.Popen(
        [*command, "--port", str(port)],
        env={**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}/v1"
    try:
        _wait_for(address, server)
        yield address, str(folder / "llava"), folder / "weights"
    finally:
        server.terminate()
        server.wait(20)


def _free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait_for(address, server):
    import urllib.request

    for _ in range(600):
        assert server.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(f"{address}/models", timeout=5)
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not start")


@pytest.mark.slow
def test_a_server_answers_as_the_local_engine_does(tiny, served):
    address, name, weights = served
    remote, engine = RemoteEngine(address, name), LocalEngine(PRESETS["phi3-patches"], weights)
    for number in range(2):
        picture = tiny / "pictures" / f"{number}.png"
        question = Message("user", "Describe the image.", [picture])
        pieces = list(remote.reply([question], OPTIONS))
        assert len(pieces) > 1  # it streams
        assert_same_text("".join(pieces), *certain_answer(engine, [question], OPTIONS))
        decoded = Message("user", "Describe the image.", [Image.open(picture)])
        again = [decoded, Message("assistant", "A brown dog."), Message("user", "Is there a dog?")]
        assert_same_text("".join(remote.reply(again, OPTIONS)), *certain_answer(engine, again, OPTIONS))


def assert_same_text(found: str, expected: str, is_whole: bool) -> None:
    """An unfinished character at the end is shown there and not here."""
    found, expected = found.strip("�"), expected.strip("�")
    assert found == expected if is_whole else found.startswith(expected)


@pytest.mark.slow
def test_the_page_works_with_a_model_server(tiny, served):
    from gradio_client import Client, handle_file

    from mmchat.serving import page as ui

    address, name, _ = served
    remote = RemoteEngine(address, name)
    demo = ui.build(remote, ROOT / "examples")
    ui.launch(demo, prevent_thread_lock=True, quiet=True)
    try:
        client = Client(demo.local_url, verbose=False)
        picture = handle_file(tiny / "pictures" / "1.png")
        assert client.predict("Describe the image.", picture, api_name="/ask")
        assert "model server" in remote.about
    finally:
        demo.close()


@contextmanager
def server(answer):
    """A server that answers chat requests with ``answer(handler)``; yields its address and the requests."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.send(200, {"object": "list", "data": [{"id": "vlm", "object": "model", "created": 0, "owned_by": ""}]})

        def do_POST(self):
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer(self)

        def send(self, status, content):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", requests
    finally:
        running.shutdown()
        running.server_close()


def refusing(status):
    return lambda handler: handler.send(status, {"error": {"message": "/srv/secret/path", "type": "x"}})


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (400, "rejected the request"),
        (401, "rejected the API key"),
        (404, "does not have that model"),
        (429, "busy"),
        (500, "failed"),
    ],
)
def test_server_errors_become_sentences(status, sentence):
    with server(refusing(status)) as (address, _):
        remote = RemoteEngine(address)
        assert remote.model == "vlm"
        with pytest.raises(MmchatError, match=sentence) as caught:
            list(remote.reply([Message("user", "Hello?")], OPTIONS))
        assert "secret" not in str(caught.value)


def test_an_unreachable_server():
    with pytest.raises(MmchatError, match="cannot be reached"):
        RemoteEngine(f"http://127.0.0.1:{_free_port()}/v1")


def test_closing_ends_the_request():
    ended = threading.Event()

    def endless(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        event = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "vlm"}
        event["choices"] = [{"index": 0, "delta": {"content": "word "}, "finish_reason": None}]
        try:
            while True:
                handler.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                time.sleep(0.01)
        except OSError:
            ended.set()

    with server(endless) as (address, requests):
        pieces = RemoteEngine(address).reply([Message("user", "Go on.")], OPTIONS)
        assert next(pieces) == "word "
        pieces.close()
        assert ended.wait(5)
    assert requests[0]["max_tokens"] == 10 and requests[0]["temperature"] == 0


def test_bad_input_does_not_reach_the_server(tmp_path):
    (tmp_path / "no.png").write_text("text")
    with server(refusing(500)) as (address, requests):
        remote = RemoteEngine(address)
        with pytest.raises(BadInput, match="question"):
            list(remote.reply([Message("user", " ")], OPTIONS))
        with pytest.raises(BadInput, match="not a picture"):
            list(remote.reply([Message("user", "What?", [tmp_path / "no.png"])], OPTIONS))
    assert not requests


def test_large_pictures_are_scaled_down():
    with server(refusing(400)) as (address, requests), pytest.raises(MmchatError):
        list(RemoteEngine(address).reply([Message("user", "What is it?", [Image.new("RGB", (3000, 2000), "red")])]))
    kind, data = requests[0]["messages"][0]["content"][0]["image_url"]["url"].split(",")
    assert kind == "data:image/jpeg;base64" and Image.open(io.BytesIO(base64.b64decode(data))).size == (1024, 683)
