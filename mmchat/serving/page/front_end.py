"""Gradio's own scripts and style sheets, sooner in the browser than gradio sends them.

Left alone, a browser learns in three rounds which of about a hundred files the page needs, and the server compresses
each of them for every visitor. Here they are compressed once, browsers keep them for good (a changed file has another
name), the head of the page names all scripts at once, and all style sheets come as one. The theme, which gradio asks
for before it places anything, is there by then. A page that did not change is not compressed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mimetypes
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import brotli
import gradio as gr
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

FOLDER = Path(gr.__file__).parent / "templates" / "frontend"
QUALITY = 5  # of brotli; a higher one takes much longer and saves little
KEEP = {"Cache-Control": "public, max-age=31536000, immutable", "Vary": "Accept-Encoding"}
ENTRY = re.compile(r'<script type="module" crossorigin src="\./assets/([^"]+)"></script>')
THEME = "theme.css"
SHEET = re.compile(r'<link rel="stylesheet" crossorigin href="\./assets/([^"]+)">')


class FrontEnd:
    """Middleware that answers requests for gradio's files and completes the head of a page."""

    def __init__(self, app: ASGIApp, demo: gr.Blocks):
        self._app = app
        # Files that gradio's folder lacks: the theme, and for each page its style sheets in one.
        self._made = {THEME: demo.theme_css.encode()}
        self._theme = f"v={demo.theme_hash}"
        self._heads = {page: self._head(_types(demo, page)) for page, *_ in demo.pages}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "GET":
            folder, _, name = scope["path"].strip("/").rpartition("/")
            takes_brotli = "br" in Headers(scope=scope).get("Accept-Encoding", "")
            is_theme = name == THEME and scope["query_string"].decode() == self._theme
            if is_theme or (folder == "assets" and (name in self._made or name in _names())):
                await self._file(name, takes_brotli)(scope, receive, send)
                return
            if not folder and name in self._heads:
                send = _Completed(send, self._heads[name], takes_brotli)
        await self._app(scope, receive, send)

    def _file(self, name: str, takes_brotli: bool) -> Response:
        is_packed = takes_brotli and name.endswith((".js", ".css"))
        content = _content(name) if name in _names() else self._made[name]
        kind = mimetypes.guess_type(name)[0]
        content = _compressed_file(content) if is_packed else content
        return Response(content, 200, {**KEEP, **_encoding(is_packed)}, kind)

    def _head(self, types: list[str]) -> str:
        """What takes the place of the style sheet in the head of a page; empty if gradio's files are not as expected.

        Gradio's loader does not fetch a style sheet for which there is a link, even if that is disabled.
        """
        try:
            files = needed_files(types)
        except (IndexError, KeyError, OSError, TypeError, ValueError) as error:
            logging.debug("files of the page", exc_info=error)
            return ""
        sheets = [name for name in files if name.endswith(".css")]
        joined = b"\n".join(map(_content, sheets))
        name = f"page-{hashlib.sha256(joined).hexdigest()[:16]}.css"
        self._made[name] = joined
        scripts = [_link("modulepreload", name) for name in files if name.endswith(".js")]
        links = [_link("stylesheet", name), *(_link("stylesheet", sheet, " disabled") for sheet in sheets), *scripts]
        return f'<link rel="preload" as="style" href="./{THEME}?{self._theme}">' + "".join(links)


class _Completed:
    """Sends the HTML of a page with its head completed."""

    def __init__(self, send: Send, head: str, takes_brotli: bool):
        self._send, self._head, self._takes_brotli = send, head, takes_brotli
        self._start: Message = {}
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _is_html(message):
            self._start = message
        elif message["type"] == "http.response.body" and self._start:
            self._body += message.get("body", b"")
            if message.get("more_body"):
                return
            body = SHEET.sub(lambda found: self._head or found[0], self._body.decode(), count=1).encode()
            body = _compressed_page(body) if self._takes_brotli else body
            headers = MutableHeaders(scope=self._start)
            headers.update(
                {**_encoding(self._takes_brotli), "Content-Length": str(len(body)), "Vary": "Accept-Encoding"}
            )
            await self._send(self._start)
            await self._send({**message, "body": body})
        else:
            await self._send(message)


def needed_files(types: list[str]) -> list[str]:
    """The files in gradio's assets that a page with these types of components needs, in the order of loading.

    Gradio's bundler notes them in the scripts: a list of files, and for each import numbers of this list.
    """
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    entry, sheet = ENTRY.search(page)[1], SHEET.search(page)[1]  # type: ignore[index]
    first = _listed(_script(entry))
    root, core = _script(first[0]), _script(first[1])
    blocks = re.search(r"import\(`\./Blocks-[^`]*`\).*?__vite__mapDeps\(\[([\d,]+)\]", root)[1]  # type: ignore[index]
    names = [entry, sheet, *first, *_numbered(root, blocks)]
    loaders = dict(re.findall(r"(\w+):\{(?:[^{}]*,)?component:([^{}]*)\}", core))
    for kind in types:
        numbers = re.search(r"__vite__mapDeps\(\[([\d,]+)\]", loaders.get(kind, ""))
        names += _numbered(core, numbers[1]) if numbers else []
    return list(dict.fromkeys(names))


def _link(kind: str, name: str, more: str = "") -> str:
    return f'<link rel="{kind}" crossorigin href="./assets/{name}"{more}>'


def _types(demo: gr.Blocks, page: str) -> list[str]:
    """The types of the components that a page shows."""
    shown = [block for block in demo.blocks.values() if block.page == page and getattr(block, "visible", True)]
    return list(dict.fromkeys(block.get_block_name() for block in shown))


def _listed(script: str) -> list[str]:
    listed = re.search(r"m\.f=(\[[^\]]*\])", script)
    return [Path(name).name for name in json.loads(listed[1])]  # type: ignore[index]


def _numbered(script: str, numbers: str) -> list[str]:
    listed = _listed(script)
    return [listed[int(number)] for number in numbers.split(",")]


def _script(name: str) -> str:
    return _content(name).decode()


@cache
def _names() -> frozenset[str]:
    """The files that may be asked for."""
    return frozenset(file.name for file in (FOLDER / "assets").iterdir())


@cache
def _content(name: str) -> bytes:
    return (FOLDER / "assets" / name).read_bytes()


def _compressed(content: bytes) -> bytes:
    return brotli.compress(content, quality=QUALITY)


_compressed_file = cache(_compressed)
_compressed_page = lru_cache(maxsize=4)(_compressed)


def _encoding(takes_brotli: bool) -> dict[str, str]:
    return {"Content-Encoding": "br"} if takes_brotli else {}


def _is_html(start: Message) -> bool:
    headers: Any = Headers(raw=start["headers"])
    return start["status"] == 200 and headers.get("content-type", "").startswith("text/html")
