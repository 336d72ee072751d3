"""Recording → text, with real speech."""

from __future__ import annotations

import json
import wave
from dataclasses import replace
from threading import Event
from threading import enumerate as enumerate_threads

import av
import jiwer
import numpy as np
import pytest
import torch

from mmchat.conversation import Transcript
from mmchat.errors import BadInput, WeightsError
from mmchat.fetching import fetch
from mmchat.media import SAMPLE_RATE, read_audio
from mmchat.models import speech_recognition
from mmchat.models.speech_recognition import (
    FRAME_RATE,
    SILENCE,
    SpeechRecognizer,
    find_speech_model,
    without_loops,
)
from mmchat.presets import OFFLINE_SPEECH, SMOL, WHISPER_TINY_EN, HubRepository, SpeechPreset
from tests.conftest import SPEECH

SAID = "and so my fellow americans ask not what your country can do for you ask what you can do for your country"
NORMALIZE = jiwer.Compose(
    [
        jiwer.ToLowerCase(),
        jiwer.RemovePunctuation(),
        jiwer.RemoveMultipleSpaces(),
        jiwer.Strip(),
        jiwer.ReduceToListOfListOfWords(),
    ]
)


@pytest.fixture(scope="module")
def tiny_en():
    """Whisper tiny.en, where any model will do: it takes a third of the time."""
    return SpeechRecognizer(WHISPER_TINY_EN)


def word_errors(heard: str, times: int = 1) -> float:
    return jiwer.wer(" ".join([SAID] * times), heard, reference_transform=NORMALIZE, hypothesis_transform=NORMALIZE)


def write_wav(path, samples, rate, width=2):
    """``samples``: [time, channels], −1 to 1."""
    with wave.open(str(path), "wb") as sink:
        sink.setnchannels(samples.shape[1])
        sink.setsampwidth(width)
        sink.setframerate(rate)
        sink.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def convert(path, codec, rate, layout, sample_format):
    """Writes the speech in another container with PyAV."""
    with av.open(str(SPEECH)) as source, av.open(str(path), "w") as sink:
        stream = sink.add_stream(codec, rate=rate, layout=layout)
        resampler = av.AudioResampler(format=sample_format, layout=layout, rate=rate)
        for frame in [*source.decode(audio=0), None]:
            for part in resampler.resample(frame):
                sink.mux(stream.encode(part))
        sink.mux(stream.encode(None))
    return path


def test_every_word_is_transcribed(engine):
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
def test_any_container_sample_rate_and_channel_count(tiny_en, tmp_path, name, codec, rate, layout, sample_format):
    path = convert(tmp_path / name, codec, rate, layout, sample_format)
    assert word_errors(tiny_en.transcribe(path).text) <= 0.1


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
def test_recordings_without_speech_are_rejected(engine, tmp_path, sound):
    with pytest.raises(BadInput, match="I heard no speech in that recording"):
        engine.transcribe(write_wav(tmp_path / "sound.wav", sound, 16_000))


def pink_noise(count):
    """Noise with a power inversely proportional to the frequency, as of rain or a fan: [count], −1 to 1."""
    spectrum = np.fft.rfft(np.random.default_rng(0).normal(size=count))
    spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
    noise = np.fft.irfft(spectrum, count)
    return noise / np.abs(noise).max()


def test_loud_noise_without_speech_is_rejected(engine, tmp_path):
    path = write_wav(tmp_path / "rain.wav", 0.8 * pink_noise(12 * 16_000)[:, None], 16_000)
    with pytest.raises(BadInput, match="I heard no speech in that recording"):
        engine.transcribe(path)


def test_speech_in_noise_is_understood(engine, tmp_path):
    speech = read_audio(SPEECH)
    noise = pink_noise(len(speech))
    noise *= np.sqrt((speech**2).mean() / (noise**2).mean() / 10)  # 10 dB below the speech
    mixed = (speech + noise) / np.abs(speech + noise).max()
    assert word_errors(engine.transcribe(write_wav(tmp_path / "street.wav", mixed[:, None], 16_000)).text) <= 0.1


def test_near_silence_is_rejected_before_a_model_is_loaded(tmp_path):
    nobody = SpeechRecognizer(replace(SMOL.speech, source=HubRepository("nobody/nothing")))
    hiss = np.random.default_rng(0).uniform(-5e-4, 5e-4, size=(32_000, 1))
    with pytest.raises(BadInput, match="I heard no speech in that recording"):
        nobody.transcribe(write_wav(tmp_path / "hiss.wav", hiss, 16_000))


@pytest.mark.parametrize("content", [b"", b"not a recording at all" * 50, b"RIFF\x24\x00\x00\x00WAVEfmt "])
def test_damaged_files_get_one_clear_error_sentence(engine, tmp_path, content):
    path = tmp_path / "recording.wav"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="not a recording I can read") as caught:
        engine.transcribe(path)
    assert str(tmp_path) not in str(caught.value)


def test_a_recording_that_is_too_long_is_rejected(engine, tmp_path, monkeypatch):
    monkeypatch.setattr("mmchat.media.MAX_SECONDS", 5)
    with pytest.raises(BadInput, match="too long"):
        engine.transcribe(SPEECH)


def test_a_picture_is_rejected_as_a_recording(engine, photo):
    with pytest.raises(BadInput, match="not a recording"):
        engine.transcribe(photo)


def test_long_recordings_are_split_and_transcribed_in_order(tiny_en, tmp_path):
    rate, samples = 16000, read_audio(SPEECH)
    pause = np.zeros(25 * rate, dtype=np.float32)
    whole = np.concatenate([samples, pause, samples])[:, None]
    heard = tiny_en.transcribe(write_wav(tmp_path / "long.wav", whole, rate))
    assert word_errors(heard.text, times=2) < 0.1
    first, second = (segment.start for segment in heard.segments if "fellow" in segment.text)
    assert abs(second - first - (len(samples) + len(pause)) / rate) < 1


def test_a_model_in_another_format_is_refused(tmp_path):
    (tmp_path / "whisper-small").mkdir()
    (tmp_path / "whisper-small" / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="small is not a Whisper model in CTranslate2's format"):
        SpeechRecognizer(find_speech_model(str(tmp_path / "whisper-small"))).load()


def test_loading_whisper_keeps_pytorchs_thread_count(tiny_en):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)  # tiny.en uses one
    try:
        SpeechRecognizer(tiny_en.preset).load()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small Whisper model in the checkpoint format of OpenAI's package."""
    from whisper.model import ModelDimensions, Whisper

    torch.manual_seed(0)
    dims = ModelDimensions(
        n_mels=80,
        n_audio_ctx=1500,
        n_audio_state=16,
        n_audio_head=2,
        n_audio_layer=1,
        n_vocab=51864,
        n_text_ctx=32,
        n_text_state=16,
        n_text_head=2,
        n_text_layer=1,
    )
    path = tmp_path_factory.mktemp("whisper") / "fine-tuned.pt"
    model = Whisper(dims)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    torch.save({"dims": vars(dims), "model_state_dict": model.state_dict()}, path)
    return path


@pytest.mark.slow
def test_a_checkpoint_of_openais_package_gives_a_transcript(checkpoint, tiny_en):
    found = SpeechRecognizer(find_speech_model(str(checkpoint))).transcribe(SPEECH)
    assert type(found) is Transcript is type(tiny_en.transcribe(SPEECH))
    assert found.language == "en" and found.segments  # the weights are random, and so is the text
    assert all(part.end >= part.start >= 0 for part in found.segments)


def test_a_checkpoint_rejects_recordings_without_speech(checkpoint, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.01, (32000, 1)).clip(-1, 1)
    with pytest.raises(BadInput, match="no speech"):
        SpeechRecognizer(find_speech_model(str(checkpoint))).transcribe(write_wav(tmp_path / "n.wav", noise, 16000))


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "half.pt").write_bytes(b"PK half a file")
    with pytest.raises(WeightsError, match="half.pt"):
        SpeechRecognizer(find_speech_model(str(tmp_path / "half.pt"))).load()


@pytest.mark.parametrize(
    ("name", "repository", "language"),
    [
        ("base.en", "Systran/faster-whisper-base.en", "en"),
        ("small", "Systran/faster-whisper-small", None),
        ("distil-small.en", "Systran/faster-distil-whisper-small.en", "en"),
        ("turbo", "mobiuslabsgmbh/faster-whisper-large-v3-turbo", None),
        ("somebody/whisper-ct2", "somebody/whisper-ct2", None),
    ],
)
def test_whisper_models_by_name(name, repository, language):
    assert find_speech_model(name) == SpeechPreset(HubRepository(repository), language)


@pytest.mark.parametrize("size", OFFLINE_SPEECH)
def test_the_offline_sizes_need_no_hub(size):
    preset = find_speech_model(size)
    assert not isinstance(preset.source, HubRepository)
    assert len(SpeechRecognizer(preset).languages) == (1 if size.endswith(".en") else 99)


def test_both_offline_sizes_hear_every_word(engine, tiny_en):
    assert SMOL.speech == engine.speech_recognizer.preset == find_speech_model("base")  # see the first test
    assert word_errors(tiny_en.transcribe(SPEECH).text) == 0


def test_an_unknown_size_lists_the_known_ones():
    with pytest.raises(BadInput, match="tiny.en.*turbo"):
        find_speech_model("huge")


@pytest.mark.parametrize(
    ("recording", "language", "said", "english"),
    [("de.flac", "de", "vor dem alten Haus", "old house"), ("fr.flac", "fr", "devant la maison", "house")],
)
def test_other_languages_are_detected_and_translated(engine, recording, language, said, english):
    path = SPEECH.with_name(recording)
    heard = engine.transcribe(path)
    assert heard.language == language and said in heard.text
    translated = engine.transcribe(path, language, "translate")
    assert translated.language == language and english in translated.text


def test_a_window_is_encoded_once_for_its_language_and_its_words(engine, monkeypatch):
    """And without most of the silence that pads it to 30 seconds."""
    from faster_whisper import WhisperModel

    encoded, encode = [], WhisperModel.encode
    monkeypatch.setattr(WhisperModel, "encode", lambda *given: encoded.append(given) or encode(*given))
    for recording, language in ((SPEECH, "en"), (SPEECH.parent / "de.flac", "de")):
        encoded.clear()
        assert engine.transcribe(recording).language == language
        ((_, features),) = encoded  # [mels, frames]
        seconds = len(read_audio(recording)) / SAMPLE_RATE
        assert features.shape[1] / FRAME_RATE == pytest.approx(seconds + SILENCE, abs=0.2)


def test_a_language_is_named_by_code_or_name(engine, tiny_en):
    assert engine.languages["de"] == "German" and len(engine.languages) == 99
    assert tiny_en.transcribe(SPEECH, "English").language == "en"
    with pytest.raises(BadInput, match="There is no language 'Klingon'"):
        engine.transcribe(SPEECH, "Klingon")
    with pytest.raises(BadInput, match="must be one of transcribe, translate"):
        engine.transcribe(SPEECH, task="sing")


def test_a_model_names_the_language_that_it_does_not_support(engine, tiny_en):
    with pytest.raises(BadInput, match="does not support German.*--speech base"):
        tiny_en.transcribe(SPEECH, "de")
    with pytest.raises(BadInput, match="does not support Cantonese.*--speech turbo"):
        engine.transcribe(SPEECH, "Cantonese")


def test_the_languages_are_those_of_the_models_vocabulary(engine):
    folder = fetch(engine.speech_recognizer.preset.source)
    tokens = set(json.loads((folder / "vocabulary.json").read_text(encoding="utf-8")))
    assert all(f"<|{code}|>" in tokens for code in engine.languages)
    large = SpeechRecognizer(find_speech_model("turbo")).languages
    assert large.items() - engine.languages.items() == {("yue", "Cantonese")}


@pytest.mark.slow
def test_a_long_recording_shows_its_finished_parts_and_stops_between_segments(engine, tmp_path, monkeypatch):
    whole = np.concatenate([read_audio(SPEECH)] * 4)[:, None]
    heard, has_left, segment = [], Event(), speech_recognition.speech_segment

    def waiting(start, *others):  # a segment of the second part waits until nobody listens
        if start >= parts[0].segments[-1].end:
            heard.append(start)
            has_left.wait(60)
        return segment(start, *others)

    parts = []
    monkeypatch.setattr(
        speech_recognition, "speech_segment", lambda *found: waiting(*found) if parts else segment(*found)
    )
    listening = engine.listen(write_wav(tmp_path / "minute.wav", whole, 16_000), "en")
    parts += [next(one for one in listening if one.text)]
    assert 0.4 < parts[0].progress < 1 and parts[0].text.count("your country") >= 4
    while not heard:
        assert next(listening) == parts[0]
    workers = [thread for thread in enumerate_threads() if thread.name.startswith("ThreadPoolExecutor")]
    listening.close()
    has_left.set()
    for worker in workers:
        worker.join(60)
    assert len(heard) == 1


@pytest.mark.parametrize(
    ("looping", "text"),
    [
        ("Thank you. Thank you. Thank you. Thank you. Thank you.", "Thank you."),
        ("I see a cat a cat a cat a cat a cat here", "I see a cat here"),
        ("No, no, no.", "No, no, no."),
        ("the cat and the dog and the bird", "the cat and the dog and the bird"),
    ],
)
def test_loops_are_written_once(looping, text):
    assert without_loops(looping) == text
