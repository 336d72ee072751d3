"""A small server with the Hugging Face Hub's file API, for huggingface_hub's client."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40  # the commit of every branch


class Hub:
    """Repositories by name, each a folder; and the failures to simulate."""

    def __init__(self, repositories: dict[str, Path]):
        self.repositories = repositories
        self.gated: set[str] = set()
        self.broken: set[str] = set()  # names of files whose download breaks off
        self.requests: list[str] = []

    def files(self, name: str) -> dict[str, Path]:
        folder = self.repositories[name]
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
            if found:
                return self.answer_api(*found.groups())
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            return self.answer_file(*found.groups()) if found else self.refuse(404, "EntryNotFound")

        def answer_api(self, name, kind, revision):
            if not self.may_read(name):
                return
            sha = revision if revision and re.fullmatch("[0-9a-f]{40}", revision) else COMMIT
            files = hub.files(name)
            if kind == "tree":
                content = [
                    {"type": "file", "path": file, "size": path.stat().st_size, "oid": _digest(path)}
                    for file, path in files.items()
                ]
            else:
                content = {"id": name, "sha": sha, "siblings": [{"rfilename": file} for file in files]}
            self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def answer_file(self, name, revision, file):
            if not self.may_read(name):
                return
            path = hub.files(name).get(file)
            if path is None:
                return self.refuse(404, "EntryNotFound")
            size = path.stat().st_size
            headers = {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
            start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
            first = int(start[1]) if start else 0
            if start:
                headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"
            self.send_head(206 if start else 200, size - first, headers)
            if self.command == "HEAD":
                return
            with path.open("rb") as stream:  # gigabytes do not fit into memory
                stream.seek(first)
                if file in hub.broken:
                    self.wfile.write(stream.read((size - first) // 2))
                    self.close_connection = True
                else:
                    shutil.copyfileobj(stream, self.wfile)

        def may_read(self, name) -> bool:
            if name in hub.gated:
                self.refuse(401, "GatedRepo")
            elif name not in hub.repositories:
                self.refuse(401, "RepoNotFound")
            else:
                return True
            return False

        def refuse(self, status, code):
            self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

        def send(self, status, content, headers):
            self.send_head(status, len(content), headers)
            if self.command == "GET":
                self.wfile.write(content)

        def send_head(self, status, length, headers):
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(length))
            self.end_headers()

    return Handler


def _digest(path: Path) -> str:
    return _digest_of(path, path.stat().st_mtime_ns)


@cache
def _digest_of(path: Path, modified: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha1").hexdigest()


@contextmanager
def serve(hub: Hub):
    """Serves on a free port; yields the address for HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
