"""The page in a real browser, with the real models."""

from __future__ import annotations

import re
import threading

import pytest

from mmchat.serving import page as ui
from tests.browsing import answers, ask, expect, finished, give, is_still, question, record_replies, show, thumbnails
from tests.conftest import ROOT

pytestmark = pytest.mark.browser


def test_the_answer_to_a_typed_question_streams_in(page):
    page.evaluate("""() => { window.lengths = new Set();
        new MutationObserver(() => { const all = document.querySelectorAll('#chat .bot .prose');
            if (all.length) window.lengths.add(all[all.length - 1].textContent.length); })
        .observe(document.querySelector('#chat'), {childList: true, subtree: true, characterData: true}); }""")
    ask(page, "Tell me a long story about the sea.")
    finished(page)
    assert len(answers(page).last.inner_text()) > 20
    assert len(page.evaluate("[...window.lengths]")) > 5  # it grew
    expect(question(page)).to_have_value("")
    details = page.locator("#chat .thought-group")
    details.locator(".title").click()
    expect(details).to_contain_text(re.compile(r"Speed: \d+ tokens per second"))


def test_a_question_about_a_photo_and_a_follow_up(page, photo, engine, monkeypatch):
    asked = record_replies(engine, monkeypatch)
    show(page, photo)
    ask(page, "Describe the image.")
    finished(page)
    expect(page.locator("#chat .user img")).to_have_count(1)
    expect(thumbnails(page)).to_have_count(0)  # the picture moved into the conversation
    ask(page, "Is there a person?")
    expect(answers(page)).to_have_count(2)
    finished(page)
    first_answer = answers(page).first.inner_text()
    (question_then, answer_then, follow_up) = asked[-1]
    assert len(question_then.images) == 1 and question_then.images[0].read_bytes() == photo.read_bytes()
    assert answer_then.text.strip() == first_answer.strip()
    assert follow_up.text == "Is there a person?" and not follow_up.images


def test_a_spoken_question_is_transcribed_and_answered(page):
    page.get_by_role("tab", name="Voice").click()
    page.get_by_label("Check before sending").uncheck()
    microphone = page.locator("#mic")
    microphone.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(6_000)  # half of the speech
    microphone.get_by_role("button", name="Stop").first.click()
    microphone.locator("audio, .waveform-container").first.wait_for(state="attached")
    page.wait_for_timeout(500)
    page.get_by_role("button", name="Send recording").click()
    expect(page.locator("#chat .user").last).to_contain_text(re.compile("American|country"))
    expect(answers(page).last).to_contain_text(re.compile(r"\w+"))


def test_stop_ends_the_reply_and_the_page_still_works(page, slow_writing, engine, monkeypatch):
    ended, reply = [], engine.reply

    def watched(*arguments, **options):
        try:
            yield from reply(*arguments, **options)
            ended.append("by itself")
        except GeneratorExit:
            ended.append("stopped")
            raise

    monkeypatch.setattr(engine, "reply", watched)
    ask(page, "Tell me a very long story about a dragon.")
    expect(answers(page).last).to_contain_text(re.compile(r"\w+ \w+ \w+"))
    page.get_by_role("button", name="Stop", exact=True).click()
    finished(page)
    assert is_still(page) and answers(page).last.inner_text()
    assert ended == ["stopped"]
    expect(page.locator(".toast-body")).to_have_count(0)
    ask(page, "Name the capital of France.")
    expect(answers(page).last).to_contain_text("Paris")


def test_a_question_that_was_stopped_before_its_answer_is_asked_again(page, engine, monkeypatch):
    begun, reply = threading.Event(), engine.reply

    def late(*arguments, **options):
        begun.wait(60)
        yield from reply(*arguments, **options)

    monkeypatch.setattr(engine, "reply", late)
    ask(page, "Name the capital of France.")
    page.get_by_role("button", name="Stop", exact=True).click()
    begun.set()
    page.get_by_role("button", name="Retry").click()
    finished(page)
    expect(answers(page)).to_have_count(1)
    expect(answers(page)).to_contain_text("Paris")


def test_undo_during_a_reply_restores_the_question(page, slow_writing):
    ask(page, "Tell me a very long story about a dragon.")
    expect(answers(page).last).to_contain_text(re.compile(r"\w+ \w+ \w+"))
    page.get_by_role("button", name="Undo").click()
    expect(question(page)).to_have_value("Tell me a very long story about a dragon.")
    expect(page.get_by_role("button", name="Stop", exact=True)).to_have_count(0)
    assert is_still(page)
    expect(page.locator("#chat .user, #chat .bot")).to_have_count(0)
    expect(page.locator("#list li")).to_have_count(1)  # nothing is lost
    ask(page, "Name the capital of France.")
    expect(page.locator("#list li button:first-child")).to_have_text(["Name the capital of France."])


def test_an_undo_the_moment_an_answer_ends_is_not_overwritten(page):
    page.evaluate("""() => { window.undone = 0; new MutationObserver(() => {
        const undo = document.querySelector('#chat button[aria-label=Undo]');
        if (!undo || !document.querySelector('#chat .thought-group')?.innerText.includes('Details')) return;
        undo.click();
        window.undone += 1;
    }).observe(document.querySelector('#chat'), {childList: true, subtree: true, characterData: true}); }""")
    for _ in range(2):
        undone = page.evaluate("undone")
        question(page).fill("Say yes.")
        page.get_by_role("button", name="Send", exact=True).click()
        page.wait_for_function("before => undone > before", arg=undone)
        page.wait_for_timeout(500)
        expect(page.locator("#chat .user, #chat .bot")).to_have_count(0)
        expect(question(page)).to_have_value("Say yes.")
        expect(page.locator("#list li")).to_have_count(1)


def test_a_new_question_ends_the_previous_reply(page, slow_writing):
    ask(page, "Tell me a very long story about a dragon.")
    expect(answers(page).last).to_contain_text(re.compile(r"\w+ \w+ \w+"))
    ask(page, "Name the capital of France.")
    expect(answers(page)).to_have_count(2)
    finished(page)
    expect(answers(page).last).to_contain_text("Paris")
    expect(page.locator("#chat .user .prose")).to_have_count(2)


def test_a_new_chat_resets_everything_even_during_a_reply(page, slow_writing, photo):
    ask(page, "Tell me a very long story about a dragon.")
    expect(answers(page).last).to_contain_text(re.compile(r"\w+ \w+ \w+"))
    show(page, photo)
    question(page).fill("half a question")
    page.get_by_role("button", name="New chat", exact=True).click()
    expect(page.locator("#chat .user")).to_have_count(0)
    expect(page.get_by_role("button", name="Stop", exact=True)).to_have_count(0)
    assert is_still(page)
    expect(page.locator("#chat .user, #chat .bot")).to_have_count(0)
    expect(question(page)).to_have_value("")
    expect(thumbnails(page)).to_have_count(0)


def test_retry_answers_again_and_undo_restores_the_question(page, photo, engine, monkeypatch):
    show(page, photo)
    ask(page, "Describe the image.")
    finished(page)
    replies = record_replies(engine, monkeypatch)
    page.get_by_role("button", name="Retry").click()
    expect(page.locator("#chat .option")).to_have_text(["‹ Show answer 1 of 2"])
    finished(page)
    expect(answers(page)).to_have_count(1)
    assert [message.text for message in replies[0]] == ["Describe the image."] and len(replies) == 1
    page.get_by_role("button", name="Undo").click()
    expect(question(page)).to_have_value("Describe the image.")
    expect(thumbnails(page)).to_have_count(1)
    expect(page.locator("#chat .user")).to_have_count(0)


def test_one_click_on_an_example_asks_it(page):
    text, _ = ui.read_examples(ROOT / "examples")[0]
    page.locator("#chat .examples button").first.click()
    finished(page)
    expect(page.locator("#chat .user img")).to_have_count(1)
    expect(page.locator("#chat .user .prose")).to_have_text(text)


def test_several_pictures_are_numbered_in_each_question(page, photo, engine, monkeypatch):
    asked = record_replies(engine, monkeypatch)
    show(page, photo.with_name("coffee.jpg"))
    ask(page, "What is this?")
    finished(page)
    show(page, photo)
    show(page, photo.with_name("bus.jpg"))
    ask(page, "What is in picture 2?")
    finished(page)
    assert [path.name for path in asked[-1][-1].images] == ["astronaut.jpg", "bus.jpg"]
    pictures = page.locator("#chat .user .image-container")
    captions = pictures.evaluate_all("all => all.map(one => getComputedStyle(one, '::after').content)")
    assert captions == ["none", '"Picture 1"', '"Picture 2"']
    assert pictures.locator("img").evaluate_all("all => all.map(one => one.alt)") == [
        "Picture 1",
        "Picture 1",
        "Picture 2",
    ]
    ask(page, "And in picture 1?")
    finished(page)
    assert [len(message.images) for message in asked[-1] if message.role == "user"] == [1, 2, 0]


def test_a_picture_is_prefilled_while_the_question_is_being_typed(page, photo, engine):
    engine.forget(pictures=True)
    show(page, photo)
    while not len(engine.prefix_cache):
        page.wait_for_timeout(50)
    ask(page, "What is this?")
    finished(page)
    assert len(engine.prefix_cache) == 1  # it was extended


def test_pictures_can_be_dropped_and_pasted_anywhere_also_while_speaking(page, photo):
    shown = page.locator("#box .thumbnail-item:visible")
    give(page, "drop", photo)
    expect(shown).to_have_count(1)
    page.get_by_role("tab", name="Voice").click()
    page.locator("#mic").wait_for()
    give(page, "paste", photo)
    expect(shown).to_have_count(2)
    give(page, "drop", photo, "#mic button")
    expect(shown).to_have_count(3)
    expect(question(page)).to_be_hidden()
    page.get_by_role("button", name="Remove file").first.click()
    expect(shown).to_have_count(2)
    page.get_by_role("tab", name="Text").click()
    expect(question(page)).to_be_visible()
    expect(shown).to_have_count(2)


def test_a_text_file_named_as_a_picture_gets_a_toast(page, tmp_path):
    path = tmp_path / "picture.png"
    path.write_text("This is text.")
    show(page, path)
    ask(page, "What is it?")
    expect(page.locator(".toast-body")).to_contain_text("not a picture I can read")
    expect(question(page)).to_have_value("What is it?")  # nothing is lost


def test_save_downloads_the_conversation(page):
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator(".toast-body")).to_contain_text("There is nothing to save yet")
    ask(page, "What is the capital of France?")
    finished(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save", exact=True).click()
    saved = download.value.path().read_text()
    assert download.value.suggested_filename == "What is the capital of France.md"
    shown = answers(page).last.inner_text().split()
    assert "## User\nWhat is the capital of France?\n" in saved and saved.split()[-len(shown) :] == shown


def test_an_empty_question_gets_a_toast(page):
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.locator(".toast-body")).to_contain_text("Please type a question")


def test_the_composer_is_in_view_and_nothing_scrolls_sideways(page, photo):
    sizes = [(390, 844), (360, 640), (1280, 800)]
    for width, height in sizes:
        page.set_viewport_size({"width": width, "height": height})
        page.reload()
        question(page).wait_for()
        if height > 700:
            expect(page.get_by_role("heading", name="Ask about a picture")).to_be_in_viewport()
        for tab in ("Voice", "Text"):
            page.get_by_role("tab", name=tab).click()
            page.locator("#mic" if tab == "Voice" else "#box").wait_for()
            assert_in_view(page, width, height)
        show(page, photo)
        assert_in_view(page, width, height)
        page.get_by_role("tab", name="Voice").click()
        page.locator("#mic").wait_for()
        assert_in_view(page, width, height)
        page.get_by_role("tab", name="Text").click()
    ask(page, "What is the capital of France?")
    finished(page)
    for width, height in sizes:
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(300)
        assert_in_view(page, width, height)


def assert_in_view(page, width, height):
    bottom = page.locator("#composer").evaluate("e => e.getBoundingClientRect().bottom")
    assert 0 < bottom <= height and page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(("kind", "file"), [("Image", "spy.png"), ("Audio", "spy.wav")])
def test_a_picture_or_sound_linked_in_an_answer_is_not_fetched(page, address, kind, file):
    page = page.context.new_page()  # whose requests are not counted
    page.goto(address)
    question(page).wait_for()
    blocked = page.evaluate(
        """([kind, url]) => new Promise(resolve => {
        document.addEventListener('securitypolicyviolation', event => resolve(event.blockedURI));
        const linked = new window[kind]();
        linked.onload = linked.onerror = () => setTimeout(() => resolve("not blocked"), 1000);
        linked.src = url; })""",
        [kind, f"https://example.com/{file}"],
    )
    assert blocked == f"https://example.com/{file}"
