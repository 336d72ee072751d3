#!/usr/bin/env python
"""Measures text to speech and speech recognition of `smol` on this machine. Takes about three minutes on two cores.

python benchmarks/voice.py
python benchmarks/voice.py --only readback hearing
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PHOTOS = sorted((ROOT / "examples").glob("*.jpg"))
SPEECH = ROOT / "tests" / "data" / "jfk.flac"
SPEECH_TEXT = (
    "And so, my fellow Americans, ask not what your country can do for you, ask what you can do for your country."
)
STORY = (
    "The old lighthouse stood on a cliff above the sea. Every evening the keeper climbed the stairs and lit the lamp."
)


def real_time_factor(engine) -> None:
    """Seconds of work per second of sound, and seconds until a short sentence is spoken."""
    engine.speak("Ready.")
    runs = []
    for _ in range(10):
        start = time.perf_counter()
        samples, rate = engine.speak(STORY)
        runs.append((time.perf_counter() - start) / (len(samples) / rate))
    print(f"voice: {median(runs):.3f} s of work per second of sound, one thread")


def first_sound(engine) -> None:
    """Seconds from a question about a new picture to the first sentence as sound; median of 20."""
    from mmchat import Message, SamplingOptions
    from mmchat.models.text_to_speech import BackgroundReader

    runs, words = [], []
    for index in range(20):
        engine.forget(pictures=True)
        question = ("Describe the image.", "What is in this picture?")[index % 2]
        start = time.perf_counter()
        reader = BackgroundReader(engine.read_aloud)
        message = Message("user", question, [PHOTOS[index % len(PHOTOS)]])
        with closing(engine.reply([message], SamplingOptions(temperature=0, max_new_tokens=64))) as pieces:
            spoken = None
            for piece in pieces:
                reader.feed(piece)
                spoken = spoken or next(reader.ready(), None)
                if spoken:
                    break
            else:
                reader.finish()
        spoken = spoken or next(reader.rest())
        reader.close()
        runs.append(time.perf_counter() - start)
        words.append(len(spoken.text.split()))
    print(
        f"first sound after a question about a new picture: {median(runs):.2f} s "
        f"(median of 20, slowest {max(runs):.2f} s; {median(words):.0f} words in the first sentence)"
    )


def beside(engine) -> None:
    """How much reading aloud slows the tokens of the answer: pairs of runs with and without the voice."""
    from mmchat import Message, SamplingOptions
    from mmchat.models.text_to_speech import BackgroundReader

    options = SamplingOptions(temperature=0, max_new_tokens=160)
    question = [Message("user", "Write a story about a lighthouse in ten short sentences.")]

    def seconds(aloud: bool) -> float:
        engine.forget()
        reader = BackgroundReader(engine.read_aloud) if aloud else None
        start, count = time.perf_counter(), 0
        for piece in engine.reply(question, options):
            count += 1
            if reader:
                reader.feed(piece)
                list(reader.ready())
        took = time.perf_counter() - start
        if reader:
            reader.finish()
            list(reader.rest())
        return took / count

    seconds(True), seconds(False)
    ratios, plain = [], []
    for _ in range(7):
        without = seconds(False)
        ratios.append(seconds(True) / without)
        plain.append(1 / without)
    print(
        f"reading aloud: {median(ratios) - 1:+.1%} time per piece of the answer; {median(plain):.0f} pieces/s without"
    )


def readback(engine) -> None:
    """Word error rate of Whisper on 40 sentences that the voice reads."""
    from mmchat.models.text_to_speech import write_wav
    from mmchat.training.evaluation.metrics import word_error_rate

    entries = json.loads((ROOT / "tests" / "data" / "spoken.json").read_text(encoding="utf-8"))
    heard = []
    with tempfile.TemporaryDirectory() as folder:
        for entry in entries:
            write_wav(Path(folder) / "said.wav", *engine.speak(entry["text"]))
            heard.append(engine.transcribe(Path(folder) / "said.wav", "en").text)
    said = [entry.get("said", entry["text"]) for entry in entries]
    plain = [index for index, entry in enumerate(entries) if entry["plain"]]
    easy, whole = (
        word_error_rate([heard[index] for index in chosen], [said[index] for index in chosen])
        for chosen in (plain, range(len(said)))
    )
    print(f"word error rate of the voice, heard by Whisper: {easy} on plain sentences, {whole} on all")


def noise(engine) -> None:
    """Word error rate of each offline speech model on 40 sentences of our voice and a real speech, in pink noise."""
    import numpy as np

    from mmchat.media import SAMPLE_RATE, read_audio
    from mmchat.models.speech_recognition import SpeechRecognizer
    from mmchat.models.text_to_speech import write_wav
    from mmchat.presets import OFFLINE_SPEECH
    from mmchat.training.evaluation.metrics import word_error_rate

    entries = json.loads((ROOT / "tests" / "data" / "spoken.json").read_text(encoding="utf-8"))
    said = [entry.get("said", entry["text"]) for entry in entries] + [SPEECH_TEXT]
    random_numbers = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "said.wav"
        recordings = []
        for entry in entries:
            write_wav(path, *engine.speak(entry["text"]))
            recordings.append(read_audio(path))
        recordings.append(read_audio(SPEECH))
        for name, preset in OFFLINE_SPEECH.items():
            recognizer = SpeechRecognizer(preset)
            for ratio in (None, 10, 0):
                heard = []
                for samples in recordings:
                    if ratio is not None:
                        samples = samples + _pink_noise(samples, ratio, random_numbers)
                    write_wav(path, 0.5 * samples / np.abs(samples).max(), SAMPLE_RATE)
                    heard.append(recognizer.transcribe(path, "en").text)
                condition = "clean" if ratio is None else f"noise at {ratio} dB"
                print(f"{name}, {condition}: word error rate {word_error_rate(heard, said)}")


def _pink_noise(samples, ratio, random_numbers):
    """Noise with a power inversely proportional to the frequency, ``ratio`` dB below the samples' power."""
    import numpy as np

    spectrum = np.fft.rfft(random_numbers.standard_normal(len(samples)))
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    pink = np.fft.irfft(spectrum, len(samples))
    return pink * np.sqrt((samples**2).mean() / (pink**2).mean() / 10 ** (ratio / 10))


def hearing(_) -> None:
    """Time of each offline speech model on eleven seconds of real speech, its language detected or given."""
    from mmchat.models.speech_recognition import SpeechRecognizer
    from mmchat.presets import OFFLINE_SPEECH

    for name, preset in OFFLINE_SPEECH.items():
        recognizer = SpeechRecognizer(preset)
        recognizer.load()
        for language in (None, "en"):
            runs = []
            for _ in range(7):
                recognizer.transcribe(SPEECH.with_name("de.flac"), language)  # the last window is remembered
                start = time.perf_counter()
                recognizer.transcribe(SPEECH, language)
                runs.append(time.perf_counter() - start)
            print(f"{name}, language {language or 'detected'}: {median(runs):.2f} s for eleven seconds of speech")


MEASURES = {
    "real-time-factor": real_time_factor,
    "first-sound": first_sound,
    "beside": beside,
    "readback": readback,
    "noise": noise,
    "hearing": hearing,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES), help="what to measure")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    import mmchat

    engine = mmchat.load("smol")
    engine.warm_up()
    for name in options.only:
        MEASURES[name](engine)


if __name__ == "__main__":
    main()
