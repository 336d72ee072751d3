"""With cached weights the app contacts no other machine. test_browser.py covers the page."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from gradio_client import Client, handle_file

from tests.conftest import ROOT, SPEECH, page_address
from tests.raw import endpoints, served, upload

OURS = {"127.0.0.1", "localhost", "::1", "0.0.0.0", "None"}


@pytest.mark.slow
def test_the_app_contacts_no_other_machine(tmp_path, photo):
    asked, log = tmp_path / "asked.txt", tmp_path / "log.txt"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "GRADIO_"))}
    command = [sys.executable, "-m", "tests.watched", str(asked), "app.py", "--preset", "smol"]
    with log.open("w") as sink:
        app = subprocess.Popen(
            command, cwd=ROOT, stdout=sink, stderr=sink, env={**environment, "PYTHONUNBUFFERED": "1"}
        )
    try:
        client = Client(page_address(app, log), verbose=False)
        assert client.predict("What is in the picture?", handle_file(photo), True, api_name="/ask")
        spoken = [upload(client.src, SPEECH), None, [], None, "", False, False]
        assert "country" in served(client.src, endpoints(client.src)["add_voice"], spoken)
    finally:
        app.terminate()
        app.wait()
    said = log.read_text()
    names = set(asked.read_text().split())
    assert names & OURS and not names - OURS
    assert "picture?" not in said and "country" not in said, "what is asked and said is not logged"
