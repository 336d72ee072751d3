"""What people expect of a chat page, done in a browser as a person would, with the real models."""

from __future__ import annotations

import json
import re

import pytest
from gradio_client import Client

from mmchat import SamplingOptions
from mmchat.serving.page import MAX_CONCURRENT
from tests.browsing import (
    answers,
    ask,
    expect,
    finished,
    question,
    record_replies,
    reload,
    show,
    thumbnails,
    violations,
)

pytestmark = pytest.mark.browser


def details(page):
    return page.locator("#chat .thought-group .title")


def edit(page):
    return page.locator(".mm-edit:visible")


def test_both_answers_of_a_retry_can_be_flipped_to_also_after_a_reload(page):
    ask(page, "Name a color.")
    finished(page)
    page.get_by_role("button", name="Retry").click()
    options = page.locator("#chat .option")
    expect(options).to_have_text(["‹ Show answer 1 of 2"])
    finished(page)
    expect(answers(page)).to_have_count(1)
    options.first.click()
    expect(options).to_have_text(["Show answer 2 of 2 ›"])
    details(page).click()
    page.wait_for_timeout(500)
    assert violations(page) == [], "two answers, and the details"
    reload(page)
    expect(options).to_have_text(["Show answer 2 of 2 ›"])
    options.first.click()
    expect(options).to_have_text(["‹ Show answer 1 of 2"])


def test_an_edited_question_goes_on_from_there_and_the_old_conversation_stays(page, photo):
    show(page, photo)
    ask(page, "Who is this?")
    finished(page)
    ask(page, "Is there a dog?")
    expect(answers(page)).to_have_count(2)
    finished(page)
    edit(page).last.click()
    expect(question(page)).to_have_value("Is there a dog?")
    expect(answers(page)).to_have_count(1)
    ask(page, "Is there a flag?")
    expect(answers(page)).to_have_count(2)
    finished(page)
    titles = page.locator("#list li button:first-child")
    expect(titles).to_have_count(2)
    titles.last.click()
    expect(page.locator("#chat .user .prose").last).to_have_text("Is there a dog?")
    edit(page).first.click()
    expect(question(page)).to_have_value("Who is this?")
    expect(thumbnails(page)).to_have_count(1)
    expect(page.locator("#chat .user")).to_have_count(0)


def test_details_are_under_a_fold_and_not_in_what_is_copied(page, photo):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    show(page, photo)
    ask(page, "What is this?")
    finished(page)
    expect(details(page)).to_have_count(1)
    expect(details(page)).to_contain_text(re.compile(r"Details\s+\d+ tokens?"))
    details(page).click()
    told = page.locator("#chat .thought-group")
    for line in ("Model: smol", "Time to the first token", "Seen in picture 1"):
        expect(told).to_contain_text(line)
    page.get_by_role("button", name=re.compile("Copy")).last.click()
    page.wait_for_timeout(500)
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == answers(page).last.inner_text().strip()


def set_number(page, label, value):
    """Types a number beside a slider, or into a number field."""
    field = page.locator("#settings input[type=number]").and_(page.get_by_label(label)).first
    field.fill(str(value))
    field.press("Tab")


def test_each_setting_reaches_the_engine_is_kept_in_the_browser_and_resets(page, engine, monkeypatch):
    asked = record_replies(engine, monkeypatch, lambda messages, options: (messages, options))
    page.get_by_role("button", name="Settings", exact=False).first.click()
    page.get_by_label("System prompt").wait_for()
    assert page.locator("#settings .block").evaluate_all("all => all.every(e => e.scrollWidth <= e.clientWidth)")
    for label, value in (("Temperature", 0.7), ("Longest answer", 32), ("Top-p", 0.6), ("Careful", 2), ("Seed", 17)):
        set_number(page, label, value)
    page.get_by_label("System prompt").fill("Answer in one word.")
    page.wait_for_function("localStorage.getItem('mmchat-settings')?.includes('one word')")
    reload(page)
    page.wait_for_timeout(500)  # a person is slower than the settings are read
    ask(page, "Name a color.")
    finished(page)
    messages, options = asked[-1]
    assert (messages[0].role, messages[0].text) == ("system", "Answer in one word.")
    assert options == SamplingOptions(temperature=0.7, top_p=0.6, max_new_tokens=32, beams=2, seed=17)
    page.get_by_role("button", name="Reset settings").click()
    page.wait_for_function("!localStorage.getItem('mmchat-settings').includes('one word')")
    reload(page)
    page.wait_for_timeout(500)
    ask(page, "Name a color.")
    finished(page)
    messages, options = asked[-1]
    assert messages[0].role == "user" and options == SamplingOptions()


def test_an_exact_answer_is_greedy_and_a_rewritten_one_keeps_its_draft(page, engine, monkeypatch):
    asked = record_replies(engine, monkeypatch, lambda messages, options: options.temperature)
    page.get_by_role("button", name="Settings", exact=False).first.click()
    page.get_by_label("Exact").check()
    page.get_by_label("Rewrite answers").check()
    ask(page, "Name a color.")
    finished(page)
    assert asked == [0.0, 0.0]  # the draft and the rewritten answer
    expect(page.locator("#chat .thought-group").get_by_text("Draft")).to_have_count(1)


def test_a_busy_page_shows_the_place_in_line(page, slow_writing, address):
    client = Client(address, verbose=False)
    story = "Tell me a very long story about a dragon."
    jobs = [client.submit(story, api_name="/ask") for _ in range(MAX_CONCURRENT + 1)]
    page.wait_for_timeout(500)
    question(page).fill("What is the capital of France?")
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.locator("#status")).to_contain_text(re.compile(r"queue: \d+/\d+"))
    for job in jobs:
        job.cancel()
    expect(answers(page).last).to_contain_text(re.compile(r"\w+"))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width, height", [(1280, 900), (390, 844)])
def test_axe_finds_no_serious_violation(page, address, photo, width, height, theme):
    page.set_viewport_size({"width": width, "height": height})
    page.goto(f"{address}?__theme={theme}")
    question(page).wait_for()
    page.wait_for_timeout(500)
    assert violations(page) == [], "an empty conversation"
    show(page, photo)
    assert violations(page) == [], "a thumbnail"
    ask(page, "What is this?")
    finished(page)
    page.wait_for_timeout(500)
    assert violations(page) == [], "an answer"
    if width > 900:
        page.get_by_role("button", name="Settings", exact=False).first.click()
    page.get_by_role("tab", name="Voice").click()
    page.locator("#mic").wait_for()
    page.wait_for_timeout(500)
    assert violations(page) == [], "the Voice tab"
    if width < 900:
        page.locator("#side .toggle-button").click()
        page.get_by_role("button", name="Settings", exact=False).first.click()
        page.get_by_label("System prompt").wait_for()
        page.wait_for_timeout(500)
        assert violations(page) == [], "the sidebar"


NAME = "element => element.ariaLabel || element.innerText.trim()"
FOCUSED = f"() => ({NAME})(document.activeElement)"


def press(page, name):
    """Reaches a button with the Tab key and presses Enter."""
    page.locator("#box textarea").focus()
    passed = []
    while (focused := page.evaluate(FOCUSED)) != name:
        assert len(passed) < 80, passed
        passed.append(focused)
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")


def test_cards_and_the_buttons_of_an_answer_work_with_the_keyboard_alone(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    card = page.locator("#chat .examples button").first
    text = card.inner_text().strip()
    press(page, card.evaluate(NAME))
    finished(page)
    expect(page.locator("#chat .user .prose")).to_have_text(text)
    press(page, "Retry")
    options = page.locator("#chat .option")
    expect(options).to_have_text(["‹ Show answer 1 of 2"])
    finished(page)
    second = answers(page).last.inner_text()
    press(page, "Copy message")  # of the question, the first one
    page.wait_for_timeout(500)
    assert page.evaluate("navigator.clipboard.readText()").strip() == text
    press(page, "Read aloud")
    page.wait_for_function("mmchatVoice.played > 0")
    press(page, "‹ Show answer 1 of 2")
    expect(options).to_have_text(["Show answer 2 of 2 ›"])
    press(page, "Show answer 2 of 2 ›")
    expect(answers(page).last).to_have_text(second)
    press(page, "Edit question")
    expect(question(page)).to_have_value(text)
    expect(thumbnails(page)).to_have_count(1)


def test_the_page_works_with_the_keyboard_alone(page, engine, monkeypatch):
    asked = record_replies(engine, monkeypatch)
    page.locator("#box textarea").focus()
    page.keyboard.type("What is the capital")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("of France?")
    page.keyboard.press("Enter")
    expect(answers(page).last).to_contain_text("Paris")
    finished(page)
    assert asked[-1][-1].text == "What is the capital\nof France?"
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(FOCUSED))
    wanted = {"New chat", "Search conversations", "Edit question", "Retry", "Undo", "Text", "Voice", "Send"}
    assert not wanted - reached, reached


def test_the_sidebar_works_with_the_keyboard_alone(page):
    page.on("dialog", lambda dialog: dialog.accept("Paints" if dialog.type == "prompt" else None))
    titles, asked = page.locator("#list li button:first-child"), page.locator("#chat .user .prose")
    ask(page, "Name a color.")
    finished(page)
    press(page, "Rename Name a color.")
    expect(titles).to_have_text(["Paints"])
    press(page, "New chat")
    expect(asked).to_have_count(0)
    press(page, "Open Paints")
    expect(asked).to_have_text("Name a color.")
    press(page, "Toggle Sidebar")
    expect(titles).to_be_hidden()
    press(page, "Toggle Sidebar")
    expect(titles).to_be_visible()
    press(page, "Delete Paints")
    expect(titles).to_have_count(0)
    expect(asked).to_have_count(0)


def test_at_200_percent_zoom_everything_is_in_view(page, photo):
    page.set_viewport_size({"width": 640, "height": 450})  # 1280 x 900 at 200%
    reload(page)
    ask(page, "What is the capital of France?")
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 640
    assert page.locator("#composer").evaluate("e => e.getBoundingClientRect().bottom") <= 450
    assert page.locator("#chat").evaluate("e => e.clientHeight") >= 100
    show(page, photo)
    page.get_by_role("tab", name="Voice").click()
    for name in ("Send recording", "Talk hands-free"):
        button = page.get_by_role("button", name=name)
        button.scroll_into_view_if_needed()
        assert button.evaluate("e => e.getBoundingClientRect().bottom") <= 450
    assert page.locator("#chat").evaluate("e => e.clientHeight") >= 100
    assert page.evaluate("document.documentElement.scrollWidth") <= 640


def test_the_page_is_light(page):
    sizes = json.loads(
        page.evaluate("JSON.stringify(performance.getEntriesByType('resource').map(e => e.decodedBodySize))")
    )
    assert sum(sizes) < 3_000_000
