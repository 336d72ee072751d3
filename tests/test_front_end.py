"""Gradio's scripts and style sheets as the page sends them."""

from __future__ import annotations

import re

import httpx
import pytest

from mmchat.serving import page as ui
from mmchat.serving.page import front_end
from tests.conftest import ROOT

ASSETS = """() => performance.getEntriesByType('resource').map(entry => new URL(entry.name).pathname)
    .filter(path => path.startsWith('/assets/')).map(path => path.slice('/assets/'.length))"""
NAMED = """() => [...document.querySelectorAll('head link[href^="./assets/"]:not([disabled])')]
    .map(link => link.getAttribute('href').slice('./assets/'.length))"""


class Engine:
    """Stands for the models."""

    about = "A stand-in."

    def reply(self, *_, **__):
        yield "Yes."


@pytest.fixture(scope="module")
def address():
    demo = ui.build(Engine(), ROOT / "examples")
    ui.launch(demo, prevent_thread_lock=True, quiet=True)
    yield demo.local_url
    demo.close()


@pytest.mark.browser
@pytest.mark.parametrize("place", ["", "batch"])
def test_the_head_names_every_file_that_the_page_loads_and_no_other(browser, address, place):
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{address}{place}", wait_until="commit")
    page.locator("#batch textarea" if place else "#box textarea").wait_for(timeout=60_000)
    page.wait_for_timeout(500)
    loaded = page.evaluate(ASSETS)
    assert len(loaded) == len(set(loaded)) and set(loaded) == set(page.evaluate(NAMED))
    assert len([name for name in loaded if name.endswith(".css")]) == 1
    context.close()


def test_files_are_compressed_and_kept_for_good(address):
    assets = front_end.FOLDER / "assets"
    name = max(front_end.needed_files(["chatbot"]), key=lambda name: (assets / name).stat().st_size)
    packed = httpx.get(f"{address}assets/{name}", headers={"Accept-Encoding": "br"})
    plain = httpx.get(f"{address}assets/{name}", headers={"Accept-Encoding": "identity"})
    assert "Content-Encoding" not in plain.headers and plain.content == (assets / name).read_bytes()
    assert packed.headers["Content-Encoding"] == "br"
    assert int(packed.headers["Content-Length"]) < len(plain.content) / 2
    assert all("immutable" in answer.headers["Cache-Control"] for answer in (packed, plain))
    assert "javascript" in plain.headers["Content-Type"]


def test_the_theme_is_named_in_the_head_and_kept_for_good(address):
    theme = re.search(r'<link rel="preload" as="style" href="\./(theme\.css\?v=\w+)">', httpx.get(address).text)[1]
    kept, other = httpx.get(f"{address}{theme}"), httpx.get(f"{address}theme.css?v=0")
    assert "immutable" in kept.headers["Cache-Control"] and "text/css" in kept.headers["Content-Type"]
    assert kept.text == other.text and "Cache-Control" not in other.headers


@pytest.mark.parametrize("name", ["missing.js", "%2e%2e%2findex.html", "..%2F..%2F..%2Froutes.py"])
def test_nothing_else_is_served(address, name):
    assert httpx.get(f"{address}assets/{name}").status_code in (403, 404)


def test_the_page_opens_when_gradio_is_built_in_another_way(monkeypatch):
    monkeypatch.setattr(front_end, "ENTRY", front_end.re.compile("no such line"))
    demo = ui.build(Engine(), ROOT / "examples")
    ui.launch(demo, prevent_thread_lock=True, quiet=True)
    html = httpx.get(demo.local_url).text
    demo.close()
    assert "modulepreload" not in html and front_end.SHEET.search(html) and "</html>" in html
