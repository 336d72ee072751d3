"""No raw request to any endpoint of the page can read a file of the server."""

from __future__ import annotations

import http.server
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from gradio.utils import get_upload_folder
from PIL import Image

from tests.conftest import ROOT
from tests.raw import endpoints, served, upload

CANARY = "canary-7f3a"
PHOTO = ROOT / "examples" / "ball.jpg"
USUAL = {  # normal values of the inputs
    "textbox": "Hi",
    "checkbox": False,
    "slider": 1,
    "number": 0,
    "chatbot": [],
    "multimodaltextbox": {"text": "Hi", "files": []},
}

FILE_INPUTS = {"image", "audio", "file", "multimodaltextbox"}


@pytest.fixture(scope="module")
def secrets(tmp_path_factory):
    """Secret files: a text and a picture, in the temporary folder and in the working folder."""
    folder = tmp_path_factory.mktemp("secret")
    picture = Image.new("RGB", (32, 32), (12, 34, 56))
    made = [folder / "token.txt", folder / "private.png", ROOT / "canary.txt", ROOT / "canary.png"]
    for path in made:
        if path.suffix == ".png":
            picture.info["note"] = CANARY
            picture.save(path)
            path.write_bytes(path.read_bytes() + CANARY.encode())  # after the end of the picture, which stays valid
        else:
            path.write_text(CANARY)
    yield made
    for path in made[2:]:
        path.unlink()


@pytest.fixture(scope="module")
def elsewhere():
    """A server that is reachable from this machine only, and the requests that it got."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(CANARY.encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def file_references(path: str) -> list[dict]:
    """Every way in which a request can name a file."""
    meta = {"_type": "gradio.FileData"}
    return [
        {"path": path},
        {"path": path, "meta": meta},
        {"path": path, "orig_name": "x.svg"},
        {"path": path, "orig_name": "x.svg", "meta": meta, "mime_type": "image/svg+xml"},
        {"path": f"{get_upload_folder()}/../{'../' * 8}{path.lstrip('/')}"},
        {"path": f"{get_upload_folder()}/../{'../' * 8}{path.lstrip('/')}", "meta": meta},
        {"path": None, "url": f"file://{path}", "meta": meta},
        {"path": path, "url": f"/gradio_api/file={path}", "meta": meta, "is_stream": True},
        {"path": f"/gradio_api/file={path}", "meta": meta},
        {"path": "x.png", "url": path},
        {"image": {"path": path}, "path": path},
        {"video": {"path": path}, "subtitles": None},
    ]


def histories(path: str) -> list[list]:
    """Conversations as a browser sends them, which name a file."""
    turns = [
        {"role": "user", "content": [{"type": "file", "file": file}, {"type": "text", "text": "What is it?"}]}
        for file in file_references(path)
    ]
    turns += [
        {"role": "user", "content": {"path": path}},
        {"role": "user", "content": [{"path": path, "alt_text": "x"}]},
        {"role": "user", "content": [path]},
        {
            "role": "user",
            "content": [{"type": "component", "component": "image", "value": {"path": path}, "constructor_args": {}}],
        },
        {"role": "user", "content": f"![x](/gradio_api/file={path}) <img src='file://{path}'>"},
        {"role": "assistant", "content": [{"type": "file", "file": {"path": path}}]},
    ]
    return [[turn] if turn["role"] == "user" else [turn, {"role": "user", "content": "Yes?"}] for turn in turns]


def attacks(kinds: list[str], path: str):
    """Requests to an endpoint: each file input names the file in each way; the other inputs are normal."""
    for index, kind in enumerate(kinds):
        references = file_references(path)
        named = {
            "image": references,
            "audio": references,
            "file": [*references, *([file] for file in references)],
            "chatbot": histories(path),
            "multimodaltextbox": [{"text": "Hi", "files": [file]} for file in [*references, path]],
        }.get(kind, [])
        for value in [*named, *([path] if kind in ("image", "audio", "file") else [])]:
            data = [USUAL.get(other) for other in kinds]
            data[index] = value
            yield data


def test_no_endpoint_reads_a_file_that_was_not_uploaded(address, secrets, engine, monkeypatch):
    seen = []

    def reply(messages, *_, **__):
        seen.extend(image for message in messages for image in message.images)
        yield "An answer."

    def transcribe(path):
        seen.append(path)
        raise AssertionError("a recording that was not uploaded was transcribed")

    monkeypatch.setattr(engine, "reply", reply)
    monkeypatch.setattr(engine, "transcribe", transcribe)
    named = endpoints(address)
    attempts = [
        (name, data)
        for name, endpoint in named.items()
        for path in (str(secrets[0]), str(secrets[3]))
        for data in attacks(endpoint["kinds"], path)
    ]
    assert len(attempts) > 200
    with ThreadPoolExecutor(8) as pool:  # most of an attempt is waiting for gradio's queue
        answers = pool.map(lambda attempt: served(address, named[attempt[0]], attempt[1]), attempts)
        for attempt, answer in zip(attempts, answers, strict=True):
            assert CANARY not in answer, attempt
    assert "answer_batch" in named
    good = upload(address, PHOTO)
    assert "An answer." in served(address, named["ask"], ["Hi", good, False]) and len(seen) == 1
    turn = {"role": "user", "content": [{"type": "file", "file": good}, {"type": "text", "text": "Hi"}]}
    answer = served(address, named["reply"], [[turn], None, 0, 1, 16, False, 1, 1, False, None, "", False])
    assert "An answer." in answer and len(seen) == 2
    _no_event_names_a_file(address, named, secrets)
    allowed = Path(get_upload_folder()).resolve()
    assert all(Path(path).resolve().is_relative_to(allowed) for path in seen), seen
    copied = [path for path in allowed.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert copied == [], "files in this folder are served to anybody who knows their URL"


def _no_event_names_a_file(address, named, secrets):
    """What a browser tells about an event may name a file, too."""
    path = str(secrets[0])
    answers = [[{"role": "assistant", "content": {"path": path}}], [{"role": "assistant", "content": "b"}]]
    value = json.dumps({"shown": 1, "to": 0, "answers": answers})
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    for name in ("flip", "edit", "undo", "drop_reply", "add_example", "show_notice"):
        for event in ({"value": value, "index": 0}, {"value": {"files": [{"path": path}]}, "index": 0}, {"path": path}):
            data = [USUAL.get(kind) for kind in named[name]["kinds"]]
            data = [
                turns if kind == "chatbot" else usual for kind, usual in zip(named[name]["kinds"], data, strict=True)
            ]
            assert CANARY not in served(address, named[name], data, event), (name, event)


def test_no_url_serves_a_file(address, secrets):
    urls = []
    for path in [str(secrets[0]), str(secrets[2]), "/etc/passwd", "canary.png"]:
        relative = path.lstrip("/")
        doubled = relative.replace("/", "%2f")
        urls += [
            f"gradio_api/file={path}",
            f"gradio_api/file={get_upload_folder()}/../../../../../../{relative}",
            f"gradio_api/file=..%2f..%2f..%2f..%2f{doubled}",
            f"gradio_api/file=%252e%252e%252f{doubled}",
            f"gradio_api/file/{path}",
            f"file={path}",
            f"static/../../../../../../../{relative}",
            f"static/..%2f..%2f..%2f..%2f..%2f{doubled}",
            f"assets/..%2f..%2f..%2f..%2f..%2f{doubled}",
            f"svelte/..%2f..%2f..%2f..%2f{doubled}",
            f"custom_component/1/client/component/..%2f..%2f..%2f{doubled}",
            f"gradio_api/custom_component/1/client/component/{path}",
            f"gradio_api/stream/x/0/..%2f..%2f{doubled}",
            f"gradio_api/proxy=file://{path}",
            f"gradio_api/upload_progress?upload_id={doubled}",
            f"deep_link?deep_link=..%2f..%2f{doubled}",
        ]

    def start_of(url):
        with httpx.stream("GET", f"{address}{url}", timeout=20) as answer:
            return next(answer.iter_bytes(4096), b"") if answer.status_code == 200 else b""

    with ThreadPoolExecutor(8) as pool:  # some answers wait for events
        for url, said in zip(urls, pool.map(start_of, urls), strict=True):
            assert CANARY.encode() not in said and b"root:" not in said and b"import argparse" not in said, url


def test_nothing_is_fetched_for_a_request(address, elsewhere, engine, monkeypatch):
    """No visitor can make the server send requests to other machines or to this one."""
    monkeypatch.setattr(engine, "reply", lambda *_, **__: iter(["An answer."]))
    home, asked = elsewhere
    meta = {"_type": "gradio.FileData"}
    tried = 0
    for url in (f"{home}/picture.png", f"{home.replace('127.0.0.1', 'localhost')}/x.png", "http://[::1]:1/x.png"):
        for endpoint in endpoints(address).values():
            if not FILE_INPUTS & set(endpoint["kinds"]):
                continue
            for file in ({"path": url, "meta": meta}, {"path": "x.png", "url": url, "meta": meta}, {"url": url}, url):
                named = {
                    "image": file,
                    "audio": file,
                    "file": [file],
                    "multimodaltextbox": {"text": "Hi", "files": [file]},
                }
                data = [named.get(kind, USUAL.get(kind)) for kind in endpoint["kinds"]]
                served(address, endpoint, data)
                tried += 1
        httpx.get(f"{address}gradio_api/proxy={url}", timeout=20)
        httpx.get(f"{address}gradio_api/file={url}", timeout=20)
    assert tried > 20 and asked == []


def test_an_upload_stays_in_the_upload_folder(address):
    for name in (
        "../../escaped.png",
        "/tmp/escaped.png",
        "..\\escaped.png",
        "a/../../escaped.png",
        "x\0.png",
        "x" * 400,
    ):
        answer = httpx.post(f"{address}gradio_api/upload", files={"files": (name, b"hello", "image/png")}, timeout=60)
        for path in answer.json() if answer.status_code == 200 else []:
            assert Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()), name
    assert not (ROOT / "escaped.png").exists() and not Path("/tmp/escaped.png").exists()


def test_an_uploaded_html_page_is_not_rendered(address):
    """Else its script would run with the page's origin."""
    for name, kind in (("x.html", "text/html"), ("x.svg", "image/svg+xml")):
        content = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
        (path,) = httpx.post(f"{address}gradio_api/upload", files={"files": (name, content, kind)}, timeout=60).json()
        answer = httpx.get(f"{address}gradio_api/file={path}", timeout=60)
        if answer.status_code == 200:
            assert answer.headers["content-disposition"].startswith("attachment"), name
