"""Text → speech with the real voice, heard again by the real Whisper."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import wave

import numpy as np
import pytest

from mmchat.errors import BadInput
from mmchat.models.spoken_text import sentences
from mmchat.models.text_to_speech import SAMPLE_RATE, BackgroundReader, Voice
from mmchat.training.evaluation.metrics import word_error_rate
from tests.conftest import ROOT

SENTENCES = json.loads((ROOT / "tests" / "data" / "spoken.json").read_text())
OTHER_LANGUAGES = [
    "Der Hund liegt unter dem Tisch und schläft.",
    "Il y a deux personnes dans la rue.",
    "La capital de Francia es París.",
    "Paris est la capitale de la France.",
    "O cachorro está na praia.",
    "Il gatto dorme sul divano.",
    "To jest czerwony samochód.",
    "Собака спит под столом.",
    "犬がテーブルの下で寝ています。",
    "Is het een hond of een kat?",
    "¿Has visto el perro?",
    "El are un câine.",
    "buenos días",
]


@pytest.fixture(scope="module")
def voice():
    return Voice()


@pytest.mark.parametrize(
    ("markdown", "said"),
    [
        ("Red.", ["Red."]),
        ("**Yes**, it is *very* `small`.", ["Yes, it is very small."]),
        ("# Cats\n\nThey purr. They sleep.", ["Cats.", "They purr.", "They sleep."]),
        ("- apples\n- pears,", ["apples.", "pears."]),
        ("3. Stir.\n4. Eat.", ["3: Stir.", "4: Eat."]),
        ("See [the *guide*](https://x.org/a).", ["See the guide."]),
        ("![a cat](cat.png) It sleeps.", ["a cat It sleeps."]),
        ("Go to https://www.example.com/a/b?c=1#d.", ["Go to example dot com."]),
        ("Mail me@example.org 😀", ["Mail me at example dot org."]),
        ("🎉", ["party popper."]),
        ("```py\na = 1\n```", ["Here is some Py code, 1 line long."]),
        ("| A | B |\n|---|---|\n| 1 | 2 |", ["A: 1; B: 2."]),
        ("Dr. A. Smith lives here. J. K. Rowling, too.", ["Dr. A. Smith lives here.", "J. K. Rowling, too."]),
        ("Call `snake_case()` in main.py.", ["Call snake case in main dot py."]),
        ("3 * 4 → 12", ["3 times 4 to 12."]),
        ("It is 3 + 4 - 2 − 1 = 4.", ["It is 3 plus 4 minus 2 minus 1 = 4."]),
        ("It fell from −5 to -7 °C.", ["It fell from minus 5 to minus 7 °C."]),
        ("Pages 4-7, e-mail, a - b", ["Pages 4-7, e-mail, a - b."]),
        ("Mix 2 tbsp. of oil & 1 tsp of salt.", ["Mix 2 tablespoons of oil and 1 teaspoon of salt."]),
        ("Apples, pears, etc.", ["Apples, pears, et cetera."]),
        ("Apples, etc. are good. Eat.", ["Apples, et cetera are good.", "Eat."]),
        ("Open 9:00–10:30 on Tue., Nov. 5.", ["Open 9:00 to 10:30 on Tue., Nov. 5."]),
        ("It was in May. 5 came on Sat. We left.", ["It was in May.", "5 came on Sat.", "We left."]),
        ("1M people, 2.5B years, room 12B", ["1 million people, 2.5 billion years, room 12B."]),
        ("See `data/train.csv` and `ls -l`.", ["See data slash train dot csv and ls dash l."]),
        ("> Be brave.\n\n---\n\n<b>Now</b>", ["Be brave.", "Now."]),
        ("", []),
        ("...", []),
    ],
)
def test_markdown_is_spoken_as_a_person_reads_it(markdown, said):
    assert sentences(markdown) == said


def test_a_long_sentence_is_spoken_in_clauses():
    clauses = sentences("It has " + ", ".join(f"room number {number}" for number in range(60)) + ".")
    assert len(clauses) > 2 and max(map(len, clauses)) <= 300


@pytest.mark.slow
def test_whisper_reads_the_voice_back(engine, voice, tmp_path):
    """``benchmarks/voice.py`` measures each sentence alone."""
    heard, said = {}, {}
    for plain in (True, False):
        entries = [entry for entry in SENTENCES if entry["plain"] == plain]
        assert len(entries) == 20
        texts = []
        for samples in _recordings([voice.speak(entry["text"])[0] for entry in entries]):
            _write(tmp_path / "said.wav", samples, SAMPLE_RATE)
            texts.append(engine.transcribe(tmp_path / "said.wav", "en").text)
        heard[plain], said[plain] = (
            " ".join(part) for part in (texts, [entry.get("said", entry["text"]) for entry in entries])
        )
    assert word_error_rate([heard[True]], [said[True]]).value <= 0.05
    assert word_error_rate([" ".join(heard.values())], [" ".join(said.values())]).value <= 0.1


def _recordings(spoken):
    """Sentences joined to recordings of up to half a minute: one call of Whisper takes as long for one as for ten."""
    pause, joined = np.zeros(SAMPLE_RATE // 2, np.float32), []
    for samples in spoken:
        if joined and sum(map(len, joined)) + len(samples) > 28 * SAMPLE_RATE:
            yield np.concatenate(joined)
            joined = []
        joined += [samples, pause]
    yield np.concatenate(joined)


def test_speech_is_audible_and_the_same_each_time(engine):
    samples, rate = engine.speak("The ball is red.")
    assert samples.dtype == np.float32 and samples.ndim == 1 and rate == 24_000
    assert 0.8 < len(samples) / rate < 3 and 0.1 < np.abs(samples).max() <= 1
    assert np.array_equal(samples, engine.speak("The ball is **red**.")[0])


@pytest.mark.parametrize("text", OTHER_LANGUAGES)
def test_other_languages_are_not_mangled(voice, text):
    with pytest.raises(BadInput, match="I can only speak English"):
        voice.speak(text)


@pytest.mark.parametrize(
    "text",
    [
        "Red.",
        "3.14",
        "Albert Einstein",
        "Beethoven wrote nine symphonies.",
        "The Rue de Rivoli is in Paris.",
        "sun cream (SPF 50).",
    ],
)
def test_names_and_numbers_are_english(voice, text):
    assert voice.is_english(text)


@pytest.mark.parametrize("text", ["", "  ", "---", "...", "\n\n", "<br>"])
def test_nothing_to_say_is_named(voice, text):
    with pytest.raises(BadInput, match="nothing to read aloud"):
        voice.speak(text)


def test_a_sentence_is_spoken_as_soon_as_the_next_one_begins(voice):
    written: list[str] = []

    def pieces():
        for word in "The ball is red. It lies on **the grass**. Is".split(" "):
            written.append(word)
            yield word + " "

    spoken = voice.read_aloud(pieces())
    first = next(spoken)
    assert first.text == "The ball is red." and written[-1] == "It"
    assert [one.text for one in spoken] == ["It lies on the grass.", "Is."]


def test_every_way_to_cut_a_text_into_pieces_gives_the_same_sentences(voice, monkeypatch):
    monkeypatch.setattr(voice, "say", lambda sentence: sentence)
    for entry in SENTENCES:
        for size in (1, 2, 5, 1000):
            text = entry["text"]
            cut = [text[start : start + size] for start in range(0, len(text), size)]
            assert list(voice.read_aloud(cut)) == sentences(text), (text, size)


def test_the_background_reader_speaks_while_text_arrives(voice):
    reader = BackgroundReader(voice.read_aloud)
    reader.feed("The ball is red. It")
    deadline, found = time.monotonic() + 60, []
    while not found and time.monotonic() < deadline:
        found = list(reader.ready())
        time.sleep(0.01)
    reader.feed(" is round.")
    reader.finish()
    assert [one.text for one in [*found, *reader.rest()]] == ["The ball is red.", "It is round."]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, a thread has no niceness of its own")
def test_the_background_reader_leaves_the_cores_to_the_answer():
    def niceness(_pieces=()):
        yield os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    reader = BackgroundReader(niceness)
    assert next(reader.rest()) > next(niceness())


def test_the_background_reader_reports_another_language_and_stops(voice):
    reader = BackgroundReader(voice.read_aloud)
    reader.feed("Der Hund liegt unter dem Tisch. Er")
    reader.finish()
    with pytest.raises(BadInput, match="only speak English"):
        list(reader.rest())
    assert list(reader.rest()) == []
    reader = BackgroundReader(voice.read_aloud)
    reader.close()
    reader.feed("Nobody hears this. ")
    assert list(reader.rest()) == []


def _write(path, samples, rate):
    from mmchat.models.text_to_speech import write_wav

    write_wav(path, samples, rate)
    with wave.open(str(path)) as source:
        assert (source.getnchannels(), source.getframerate(), source.getnframes()) == (1, rate, len(samples))
