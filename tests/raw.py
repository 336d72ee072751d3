"""Raw requests to the server, without the page."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import httpx

sessions = itertools.count()
client = httpx.Client(timeout=120)  # a new one would load the certificates each time


def endpoints(address: str) -> dict[str, dict]:
    """Every endpoint by name, hidden ones included; ``kinds`` are the components that it takes."""
    config = client.get(f"{address}config").json()
    kinds = {component["id"]: component["type"] for component in config["components"]}
    return {
        endpoint["api_name"]: {**endpoint, "kinds": [kinds[number] for number in endpoint["inputs"]]}
        for endpoint in config["dependencies"]
        if endpoint["backend_fn"]
    }


def upload(address: str, path: Path, name: str = "") -> dict[str, Any]:
    """Uploads a file and returns the reference that requests use."""
    files = {"files": (name or path.name, path.read_bytes())}
    answer = client.post(f"{address}gradio_api/upload", files=files)
    return {"path": answer.raise_for_status().json()[0], "meta": {"_type": "gradio.FileData"}}


def served(address: str, endpoint: dict, data: list, event: dict[str, Any] | None = None) -> str:
    """The full response of an endpoint through the queue, which also reaches private ones."""
    session = f"raw-{next(sessions)}"
    body = {"data": data, "fn_index": endpoint["id"], "session_hash": session, "event_data": event or {"index": 0}}
    joined = client.post(f"{address}gradio_api/queue/join", json=body)
    if joined.status_code != 200:
        return joined.text
    said = ""
    with client.stream("GET", f"{address}gradio_api/queue/data?session_hash={session}") as events:
        for line in events.iter_lines():
            said += line + "\n"
            if any(end in line for end in ('"process_completed"', '"close_stream"', '"unexpected_error"')):
                break
    return said
