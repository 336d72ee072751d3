"""Answers on the page's port from the start: gradio takes seconds to import."""

from __future__ import annotations

import os
import socket
import socketserver
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler
from threading import Thread

from ..errors import MmchatError

RETRY = "Retry-After"  # a header that tells these answers from the page's
PATHS = ("/", "/batch")
PORTS = {"SERVER_PORT": 7860, "NUM_PORTS": 100}  # gradio's defaults
# The page asks again until another program answers; while none does, a reload would end at the browser's error page.
PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>mmchat</title>
<style>body {{ display: grid; place-items: center; height: 90vh; font: 1rem system-ui, sans-serif }}</style>
</head>
<body>
<p role="status">mmchat is starting …</p>
<script>
setInterval(async () => {{
  const answer = await fetch(location, {{ cache: "no-store" }}).catch(() => null);
  if (answer && !answer.headers.has("{RETRY}")) location.reload();
}}, 300);
</script>
</body>
</html>
""".encode()


class Opening:
    """Listens on the page's address until the page does, and says that mmchat is starting.

    Args:
        host: the address; gradio's default if None.
        port: the first free one from gradio's default if None.

    Raises:
        MmchatError: the address or port is not available.
    """

    def __init__(self, host: str | None, port: int | None):
        first, count = (int(os.environ.get(f"GRADIO_{name}") or value) for name, value in PORTS.items())
        name = (host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1").strip("[]")
        self._server = _listen(name, range(first, first + count) if port is None else [port])
        self.port: int = self._server.server_address[1]
        Thread(target=self._server.serve_forever, args=[0.01], daemon=True).start()

    def close(self) -> None:
        """Frees the port."""
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    """Unlike ``http.server``'s, it does not look up the name of its address, which can take seconds."""

    allow_reuse_address = os.name == "posix"  # elsewhere it would let two programs listen on one port
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Says nothing: a browser went away."""


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Answer(BaseHTTPRequestHandler):
    """The page where there will be one; elsewhere 503, as while the models load."""

    def do_GET(self) -> None:
        is_page = self.path.partition("?")[0] in PATHS
        body, kind = (PAGE, "text/html") if is_page else (b'{"status": "loading"}', "application/json")
        self.send_response_only(200 if is_page else 503)
        headers = {RETRY: 1, "Content-Type": kind, "Content-Length": len(body), "Cache-Control": "no-store"}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Says nothing, as the page's server."""


def _listen(host: str, ports: Iterable[int]) -> _Server:
    server: type[_Server] = _ServerV6 if ":" in host else _Server
    for port in ports:
        try:
            return server((host, port), _Answer)
        except (OSError, OverflowError):  # the next one may be free
            continue
    raise MmchatError("That address or port is not available. Choose another with --host or --port.")
