#!/usr/bin/env python
"""Take docs/page.png anew, with today's page and weights: python docs/screenshot.py

Needs Chromium, and the packages of the extra "dev".
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
ADDRESS, PORT = "http://127.0.0.1:7899", "7899"
PICTURE = ROOT / "examples" / "bus.jpg"
QUESTIONS = ("What is this?", "What color is the bus?", "Is there a dog?")


def main() -> None:
    command = [sys.executable, "-m", "mmchat", "serve", "--preset", "smol", "--port", PORT]
    server = subprocess.Popen(command, cwd=ROOT)
    try:
        wait_for_page()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(300_000)
            page.goto(ADDRESS)
            converse(page)
            page.screenshot(path=ROOT / "docs" / "page.png")
    finally:
        server.terminate()
        server.wait()


def wait_for_page() -> None:
    for _ in range(600):
        try:
            urlopen(ADDRESS)
            return
        except OSError:
            time.sleep(0.5)
    sys.exit("The page did not come up.")


def converse(page: Page) -> None:
    """Shows the picture and asks every question; the picture is drawn small, so that the exchange fits."""
    page.locator("#image input[type=file]").set_input_files(PICTURE)
    page.locator("#image img").wait_for()
    for number, question in enumerate(QUESTIONS):
        page.get_by_label("Your question").fill(question)
        page.get_by_role("button", name="Send", exact=True).click()
        page.locator("#chat .bot .prose").nth(number).wait_for()
        page.wait_for_timeout(8_000)  # the answer is written; retrying is offered when it is whole
    page.add_style_tag(content="#chat .user img { max-height: 150px !important; width: auto !important; }")
    page.wait_for_timeout(1_000)


if __name__ == "__main__":
    main()
