"""Recording → text, with real speech."""

from __future__ import annotations

import wave

import av
import jiwer
import numpy as np
import pytest

from mmchat.errors import BadInput
from mmchat.speech import read_audio
from tests.conftest import SPEECH

SAID = "and so my fellow americans ask not what your country can do for you ask what you can do for your country"
NORMALISE = jiwer.Compose(
    [
        jiwer.ToLowerCase(),
        jiwer.RemovePunctuation(),
        jiwer.RemoveMultipleSpaces(),
        jiwer.Strip(),
        jiwer.ReduceToListOfListOfWords(),
    ]
)


def word_errors(heard: str) -> float:
    return jiwer.wer(SAID, heard, reference_transform=NORMALISE, hypothesis_transform=NORMALISE)


def write_wav(path, samples, rate, width=2):
    """``samples``: [time, channels], −1 to 1."""
    with wave.open(str(path), "wb") as sink:
        sink.setnchannels(samples.shape[1])
        sink.setsampwidth(width)
        sink.setframerate(rate)
        sink.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def convert(path, codec, rate, layout, sample_format):
    """The speech in another container, written with PyAV."""
    with av.open(str(SPEECH)) as source, av.open(str(path), "w") as sink:
        stream = sink.add_stream(codec, rate=rate, layout=layout)
        resampler = av.AudioResampler(format=sample_format, layout=layout, rate=rate)
        for frame in [*source.decode(audio=0), None]:
            for part in resampler.resample(frame):
                sink.mux(stream.encode(part))
        sink.mux(stream.encode(None))
    return path


def test_every_word_is_heard(engine):
    transcript = engine.transcribe(SPEECH)
    assert word_errors(transcript.text) == 0, transcript.text
    assert transcript.language == "en"
    assert all(0 <= part.start < part.end <= 11.1 for part in transcript.segments)
    assert " ".join(part.text for part in transcript.segments) == transcript.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "codec", "rate", "layout", "sample_format"),
    [
        ("phone.wav", "pcm_s16le", 8_000, "mono", "s16"),
        ("studio.wav", "pcm_f32le", 96_000, "5.1", "flt"),
        ("browser.webm", "libopus", 48_000, "stereo", "flt"),
        ("music.mp3", "libmp3lame", 44_100, "stereo", "s16p"),
        ("apple.m4a", "aac", 44_100, "mono", "fltp"),
    ],
)
def test_any_container_rate_and_number_of_channels(engine, tmp_path, name, codec, rate, layout, sample_format):
    path = convert(tmp_path / name, codec, rate, layout, sample_format)
    assert word_errors(engine.transcribe(path).text) <= 0.1


def test_samples_are_16_khz_mono(tmp_path):
    tone = np.sin(np.arange(48_000) / 48_000 * 440 * 2 * np.pi)[:, None].repeat(2, axis=1) * 0.5
    samples = read_audio(write_wav(tmp_path / "tone.wav", tone, 48_000))
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert abs(len(samples) - 16_000) < 50
    assert np.abs(np.fft.rfft(samples)).argmax() == pytest.approx(440, abs=2)


@pytest.mark.parametrize(
    "sound",
    [
        np.zeros((32_000, 1)),
        np.zeros((0, 1)),
        np.zeros((160, 1)),
        np.random.default_rng(0).normal(size=(32_000, 1)) * 0.02,
        np.sin(np.arange(32_000) / 16_000 * 440 * 2 * np.pi)[:, None] * 0.3,
    ],
    ids=["silence", "no samples", "a click", "hiss", "a tone"],
)
def test_no_speech_is_said_so(engine, tmp_path, sound):
    with pytest.raises(BadInput, match="I heard no speech in that recording"):
        engine.transcribe(write_wav(tmp_path / "sound.wav", sound, 16_000))


@pytest.mark.parametrize("content", [b"", b"not a recording at all" * 50, b"RIFF\x24\x00\x00\x00WAVEfmt "])
def test_broken_files_get_one_clear_sentence(engine, tmp_path, content):
    path = tmp_path / "recording.wav"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="not a recording I can read") as caught:
        engine.transcribe(path)
    assert str(tmp_path) not in str(caught.value)


def test_a_recording_that_is_too_long_is_refused(engine, tmp_path, monkeypatch):
    monkeypatch.setattr("mmchat.speech.MAX_SECONDS", 5)
    with pytest.raises(BadInput, match="too long"):
        engine.transcribe(SPEECH)


def test_a_picture_is_no_recording(engine, photo):
    with pytest.raises(BadInput, match="not a recording"):
        engine.transcribe(photo)
