"""The app as operators start it: it serves what they switch on, and contacts no other machine.

test_browser.py covers the page.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import httpx
import openai
import pytest
from gradio_client import Client, handle_file

from tests.conftest import ROOT, SPEECH, page_address
from tests.raw import endpoints, served, upload

OURS = {"127.0.0.1", "localhost", "::1", "0.0.0.0", "None"}
SETTINGS = {"MMCHAT_API_KEY": "secret", "MMCHAT_LOG": "json", "PYTHONUNBUFFERED": "1"}
KINDS = ["reply", "rewrite", "transcribe", "reply"]  # what the test asks for, in order


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["llama.cpp", "openvino"])  # OpenVINO's package would report its import
def test_the_app_with_all_its_routes_contacts_no_other_machine(tmp_path, photo, decoder):
    asked, log = tmp_path / "asked.txt", tmp_path / "log.txt"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "GRADIO_"))}
    environment |= SETTINGS | {"MMCHAT_DECODER": decoder}
    command = [sys.executable, "-m", "tests.watched", str(asked), "app.py", "--preset", "smol", "--api", "--metrics"]
    with log.open("w") as sink:
        app = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=sink, env=environment)
    try:
        address = page_address(app, log)
        health = httpx.get(f"{address}/healthz")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        while httpx.get(f"{address}/healthz").status_code == 503:
            time.sleep(0.1)
        assert httpx.get(f"{address}/healthz").json() == {"status": "ok"}
        client = Client(address, verbose=False)
        assert client.predict("What is in the picture?", handle_file(photo), True, api_name="/ask")
        spoken = [upload(client.src, SPEECH), None, [], None, "", False, False]
        assert "country" in served(client.src, endpoints(client.src)["add_voice"], spoken)
        program = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
        question = [{"role": "user", "content": "What is a zebra?"}]
        assert program.chat.completions.create(model="smol", messages=question, max_tokens=8).choices[0].message.content
        with pytest.raises(openai.AuthenticationError):
            program.with_options(api_key="wrong").models.list()
        assert httpx.get(f"{address}/metrics").status_code == 401
        metrics = httpx.get(f"{address}/metrics", headers={"authorization": "Bearer secret"}).text
    finally:
        app.terminate()
        app.wait()
    said = log.read_text()
    names = set(asked.read_text().split())
    assert names & OURS and not names - OURS
    assert not [word for word in ("picture?", "country", "zebra") if word in said], "what is asked is not logged"
    logged = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [line["kind"] for line in logged if line["message"] == "request"] == KINDS
    assert "Ready" in [line["message"] for line in logged]
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert float(values["process_resident_memory_bytes"]) > 500e6  # bytes: the models are in it
    assert "mmchat_gpu_memory_bytes" in values and float(values["mmchat_queue_length"]) == 0
    assert float(values['mmchat_questions_total{cached="false",kind="reply",outcome="answered"}']) == 2
