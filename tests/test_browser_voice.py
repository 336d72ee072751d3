"""Speech on the page, in a real browser with a fake microphone, with the real models."""

from __future__ import annotations

import re
import wave
from dataclasses import replace
from threading import Event

import numpy as np
import pytest

from mmchat.media import SAMPLE_RATE, read_audio
from tests.browsing import FLAGS, answers, ask, expect, find_chromium, finished, question
from tests.conftest import SPEECH

pytestmark = pytest.mark.browser
JAPANESE = SPEECH.with_name("ja.flac")


def write_wav(path, samples):
    with wave.open(str(path), "wb") as sink:
        sink.setnchannels(1)
        sink.setsampwidth(2)
        sink.setframerate(SAMPLE_RATE)
        sink.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


@pytest.fixture(scope="module")
def spoken_question(engine, tmp_path_factory):
    """A question by our own voice, with silence around it, which the fake microphone repeats."""
    samples, rate = engine.speak("What is the capital of France?")
    there, wanted = np.arange(len(samples)) / rate, np.arange(int(len(samples) / rate * SAMPLE_RATE)) / SAMPLE_RATE
    silence = np.zeros(4 * SAMPLE_RATE)
    whole = np.concatenate([silence[: SAMPLE_RATE // 2], np.interp(wanted, there, samples), silence])
    return write_wav(tmp_path_factory.mktemp("microphone") / "question.wav", whole)


@pytest.fixture(scope="module")
def browser(spoken_question):
    """Chromium whose microphone plays the question; its pages may play sound without a click."""
    sync_api = pytest.importorskip("playwright.sync_api")
    flags = [*FLAGS, f"--use-file-for-fake-audio-capture={spoken_question}"]
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def page(page, engine, monkeypatch):
    """A first visit. Answers are greedy: what is sampled is now and then no English, which the voice leaves out."""
    reply = engine.reply
    monkeypatch.setattr(
        engine, "reply", lambda messages, options, **more: reply(messages, replace(options, temperature=0), **more)
    )
    return page


def open_voice(page):
    page.get_by_role("tab", name="Voice").click()
    page.locator("#mic").wait_for()


def upload(page, path):
    open_voice(page)
    page.locator("#mic").get_by_role("button", name="Upload file").click()
    page.locator("#mic input[type=file]").set_input_files(str(path))
    page.locator("#mic audio, #mic .waveform-container").first.wait_for(state="attached")
    page.get_by_role("button", name="Send recording").click()


def stop(page):
    return page.get_by_role("button", name="Stop", exact=True)


def choose_language(page, name):
    page.locator("#language input").click()
    page.get_by_role("option", name=name, exact=True).click()


def clips(page):
    return page.evaluate("mmchatVoice.played")


def turn_reading_on(page):
    open_voice(page)
    page.get_by_label("Read answers aloud").check()
    page.get_by_role("tab", name="Text").click()


def wait_for_clips(page, count):
    page.wait_for_function(f"mmchatVoice.played >= {count}")


def test_the_speech_model_loads_as_the_voice_tab_opens(page, engine, monkeypatch):
    loaded = Event()
    monkeypatch.setattr(engine.speech_recognizer, "load", loaded.set)
    question(page).fill("Hello")
    assert not loaded.is_set()
    open_voice(page)
    assert loaded.wait(10)


def test_the_transcript_waits_in_the_box_for_checking(page, spoken_question):
    upload(page, spoken_question)
    expect(question(page)).to_have_value(re.compile("capital of France", re.IGNORECASE))
    expect(page.locator("#chat .user")).to_have_count(0)
    expect(stop(page)).to_have_count(0)
    question(page).fill("What is the capital of Italy?")
    page.get_by_role("button", name="Send", exact=True).click()
    finished(page)
    assert "Speech: " in unfolded(page)
    ask(page, "Name a color.")
    finished(page)
    assert "Speech: " not in unfolded(page)


def unfolded(page):
    """The details of the last answer, which are in the page only while they are open."""
    found = page.wait_for_function(
        """() => {
        const details = [...document.querySelectorAll('#chat .thought-group')].at(-1);
        if (details.innerText.includes('Time to the first token')) return details.innerText;
        details.querySelector('.title').click(); }""",
        polling=500,
    )
    return found.json_value()


def test_a_recording_is_sent_at_once_and_the_browser_keeps_the_switches(page, spoken_question):
    open_voice(page)
    page.get_by_label("Check before sending").uncheck()
    page.get_by_label("Read answers aloud").check()
    page.reload()
    question(page).wait_for()
    open_voice(page)
    expect(page.get_by_label("Check before sending")).not_to_be_checked()
    expect(page.get_by_label("Read answers aloud")).to_be_checked()
    upload(page, spoken_question)
    expect(page.locator("#chat .user").last).to_contain_text(re.compile("capital of France", re.IGNORECASE))
    expect(answers(page).last).to_contain_text(re.compile(r"\w+"))
    wait_for_clips(page, 1)


def test_another_language_is_named_and_translated(page):
    upload(page, JAPANESE)
    expect(page.locator("#heard")).to_contain_text("Heard Japanese, which the model that answers does not know")
    expect(question(page)).to_have_value(re.compile("赤いボール"))
    open_voice(page)
    expect(page.locator("#language input")).to_have_value("Detected: Japanese")
    page.get_by_label("Translate into English").check()
    choose_language(page, "Japanese")
    upload(page, JAPANESE)
    expect(question(page)).to_have_value(re.compile("red ball"))
    expect(page.locator("#heard")).to_contain_text("translated into English")


def test_the_speaker_button_reads_an_answer_and_stop_silences_it(page):
    ask(page, "Name the capital of France.")
    expect(answers(page).last).to_contain_text("Paris")
    expect(stop(page)).to_have_count(0)
    assert clips(page) == 0  # off by default
    page.get_by_role("button", name="Read aloud").click()
    wait_for_clips(page, 1)
    assert page.evaluate("mmchatVoice.speaking()")
    page.get_by_role("button", name="Read aloud").click()
    page.wait_for_function("!mmchatVoice.speaking()")


def test_answers_are_read_while_they_are_written_and_stop_ends_the_voice(page, slow_writing):
    turn_reading_on(page)
    ask(page, "Tell me a very long story about a dragon.")
    wait_for_clips(page, 1)
    expect(stop(page)).to_be_visible()  # the answer is still being written
    stop(page).click()
    page.wait_for_function("!mmchatVoice.speaking()")
    expect(stop(page)).to_have_count(0)  # no clip follows
    assert not page.evaluate("mmchatVoice.speaking()")


def test_the_speaker_button_ends_a_voice_that_goes_on_after_the_text(page):
    turn_reading_on(page)
    ask(page, "Why is the sky blue?")
    wait_for_clips(page, 1)
    finished(page)
    page.wait_for_function("mmchatVoice.speaking()")  # reading takes longer than writing
    page.get_by_role("button", name="Read aloud").last.click()
    page.wait_for_timeout(1000)
    assert not page.evaluate("mmchatVoice.speaking()")


def test_an_answer_in_another_language_is_written_and_the_page_says_that_it_has_no_voice(page, engine, monkeypatch):
    german = "Der Hund liegt unter dem Tisch. Er schläft."
    monkeypatch.setattr(engine, "reply", lambda *_, **__: (piece for piece in [german]))
    turn_reading_on(page)
    ask(page, "What is the dog doing?")
    expect(page.locator(".toast-body")).to_contain_text("only speak English")
    expect(answers(page).last).to_contain_text("Er schläft.")
    finished(page)
    page.locator(".toast-close").click()
    expect(page.locator(".toast-body")).to_have_count(0)
    page.get_by_role("button", name="Read aloud").click()
    expect(page.locator(".toast-body")).to_contain_text("only speak English")
    assert clips(page) == 0


def test_hands_free_talk_goes_on_after_an_error(page, engine, monkeypatch):
    def fail(*_, **__):
        monkeypatch.undo()
        raise RuntimeError("broken")
        yield

    monkeypatch.setattr(engine, "reply", fail)
    open_voice(page)
    choose_language(page, "English")
    page.get_by_role("button", name="Talk hands-free").click()
    expect(page.locator("#chat .user").first).to_contain_text(re.compile("capital of France", re.IGNORECASE))
    expect(page.locator("#chat .user")).to_have_count(2)  # heard again
    page.get_by_role("button", name="Stop talking").click()


def test_hands_free_talk_hears_answers_and_listens_again(page):
    open_voice(page)
    choose_language(page, "English")
    page.get_by_role("button", name="Talk hands-free").click()
    expect(page.locator("#chat .user")).to_have_count(2)  # the microphone repeats the question
    expect(page.locator("#chat .user").first).to_contain_text(re.compile("capital of France", re.IGNORECASE))
    expect(answers(page).first).to_contain_text(re.compile(r"\w+"))
    wait_for_clips(page, 2)
    page.get_by_role("button", name="Stop talking").click()
    page.wait_for_function("!mmchatVoice.hearing() && !mmchatVoice.speaking()")
    expect(page.get_by_role("button", name="Talk hands-free")).to_be_visible()


def test_without_a_microphone_one_sentence_says_so(page):
    page.evaluate(
        "() => { navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('', 'NotAllowedError')); }"
    )
    open_voice(page)
    for button in ("Talk hands-free", "Record"):
        page.evaluate("() => { document.querySelector('#talk-note').textContent = ''; }")
        page.locator("#tabs").get_by_role("button", name=button, exact=True).click()
        expect(page.locator("#talk-note")).to_contain_text("The browser gives no microphone")


def test_a_long_recording_shows_progress_and_stops(page, tmp_path, monkeypatch):
    monkeypatch.setattr("mmchat.models.speech_recognition.WINDOW", 12)  # seconds; the first part is finished sooner
    upload(page, write_wav(tmp_path / "long.wav", np.concatenate([read_audio(SPEECH)] * 4)))
    expect(page.locator("#heard")).to_contain_text(re.compile(r"\d+% heard: .*country"))
    stop(page).click()
    expect(stop(page)).to_have_count(0)
    expect(question(page)).to_have_value("")
