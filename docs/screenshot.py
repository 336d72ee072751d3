#!/usr/bin/env python
"""Retake the pictures of the page in docs/ with today's page and weights: python docs/screenshot.py

Needs Chromium, and the packages of the extra "dev".
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
ADDRESS, PORT = "http://127.0.0.1:7899", "7899"
PICTURE = ROOT / "examples" / "bus.jpg"
QUESTIONS = ("What is this?", "What color is the bus?")
SHOTS = {  # file name -> width, height, theme
    "page.png": (1280, 900, "light"),
    "page-dark.png": (1280, 900, "dark"),
    "page-phone.png": (390, 844, "light"),
}


def main() -> None:
    command = [sys.executable, "-m", "mmchat", "serve", "--preset", "smol", "--port", PORT]
    server = subprocess.Popen(command, cwd=ROOT)
    try:
        wait_for_page()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for name, (width, height, theme) in SHOTS.items():
                take(browser, name, width, height, theme)
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


def take(browser: Browser, name: str, width: int, height: int, theme: str) -> None:
    """Takes one picture of a conversation."""
    page = browser.new_page(viewport={"width": width, "height": height}, reduced_motion="reduce")
    page.set_default_timeout(300_000)
    page.goto(f"{ADDRESS}?__theme={theme}")
    page.locator("#box textarea").wait_for()
    page.wait_for_timeout(2_000)
    be_exact(page)
    converse(page)
    page.screenshot(path=ROOT / "docs" / name)
    page.close()


def be_exact(page: Page) -> None:
    """Chooses the likeliest answers, so that the pictures can be repeated."""
    sidebar, toggle = page.locator("#side"), page.locator("#side .toggle-button")
    is_folded = "open" not in sidebar.get_attribute("class").split()
    if is_folded:
        toggle.click()
    settings = page.locator("#settings button").first
    settings.click()
    page.get_by_label("Exact").check()
    settings.click()
    if is_folded:
        toggle.click()


def converse(page: Page) -> None:
    """Shows the picture, asks every question, and unfolds what happened at the last one."""
    page.locator("#box input[type=file]").set_input_files(PICTURE)
    page.locator("#box .thumbnail-item").wait_for()
    details = page.locator("#chat .thought-group .title", has_text="Details")
    for number, question in enumerate(QUESTIONS):
        page.locator("#box textarea").fill(question)
        page.get_by_role("button", name="Send", exact=True).click()
        details.nth(number).wait_for()  # the answer is whole
    details.last.click()
    page.wait_for_timeout(1_500)
    page.locator("#chat .bubble-wrap").evaluate("element => element.scrollTo(0, element.scrollHeight)")
    page.wait_for_timeout(1_000)


if __name__ == "__main__":
    main()
