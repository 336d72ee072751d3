"""Recording → text, with Whisper (Radford et al. 2022, arXiv 2212.04356)."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from functools import cache
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..conversation import SpeechSegment, Transcript
from ..errors import AssetError, BadInput, WeightsError
from ..fetching import fetch
from ..fetching.sources import HubRepository
from ..media import SAMPLE_RATE, read_audio
from ..presets import OFFLINE_SPEECH, SpeechPreset

if TYPE_CHECKING:
    from faster_whisper import WhisperModel

# Whisper sizes whose repository does not follow the naming rule of _repository.
REPOSITORIES = {
    "large": "Systran/faster-whisper-large-v3",
    "large-v3-turbo": "mobiuslabsgmbh/faster-whisper-large-v3-turbo",
    "turbo": "mobiuslabsgmbh/faster-whisper-large-v3-turbo",
    "distil-large-v3.5": "distil-whisper/distil-large-v3.5-ct2",
}
CANTONESE = "yue"  # came with large-v3; the vocabularies of smaller and older models lack it
CANTONESE_MODELS = ("large-v3", "turbo")  # in the names of the models that know it
TASKS = ("transcribe", "translate")  # Whisper's own; it translates into English only
WINDOW = 30  # seconds; Whisper's input length
SILENCE = 6  # seconds encoded after the end of a recording; with less, more words are wrong (benchmarks/voice.py)
FRAME_RATE = 100  # feature frames per second
ENGLISH_PRIOR = 3  # another language must be this many times as probable as English, so an accent is not taken for one
MAX_WORKERS = 4  # parts of a recording transcribed in parallel
POLL_SECONDS = 0.2  # how often a caller may stop while a part is being transcribed
MIN_SECONDS = 0.1
SILENT_LEVEL = 1e-3  # peak amplitude, full scale 1; a quiet voice peaks fifty times higher
MAX_COMPRESSION_RATIO = 2.4  # of gzip; above it, a text is a repetition loop (Whisper's paper)

T = TypeVar("T")
Listen = Callable[[np.ndarray, str | None, str], Iterator[Transcript]]  # samples, language or None, task


class SpeechRecognizer:
    """A Whisper model on the CPU, loaded on first use."""

    def __init__(self, preset: SpeechPreset):
        self.preset = preset
        self._loading = Lock()
        self._listen: Listen | None = None

    def fetch(self) -> Path:
        """Fetches the model if it is not there yet.

        Raises:
            AssetError: it is not available.
        """
        return fetch(self.preset.source)

    def load(self) -> None:
        """Loads the model if it is not loaded yet.

        Raises:
            AssetError: the model or a package it needs is not available.
            WeightsError: the checkpoint is damaged.
        """
        with self._loading:
            if self._listen is None:
                path = self.fetch()
                load = _openai_whisper if path.suffix == ".pt" else _faster_whisper
                self._listen = load(self.preset, path)

    @property
    def languages(self) -> dict[str, str]:
        """The languages that the model recognizes, code -> English name, such as {"de": "German"}."""
        known = dict(whisper_languages())
        if self.preset.language:
            return {self.preset.language: known[self.preset.language]}
        if not any(name in getattr(self.preset.source, "name", "") for name in CANTONESE_MODELS):
            del known[CANTONESE]
        return known

    def transcribe(self, path: str | Path, language: str | None = None, task: str = "transcribe") -> Transcript:
        """Transcribes a recording, see ``listen``."""
        *_, transcript = self.listen(path, language, task)
        return transcript

    def listen(self, path: str | Path, language: str | None = None, task: str = "transcribe") -> Iterator[Transcript]:
        """Transcribes a recording part by part.

        Closing the iterator stops the work, within one call of the model: 30 seconds of speech at most.

        Args:
            language: a code or an English name, such as "de" or "German"; detected from the recording if None.
            task: "transcribe" writes what is said; "translate" writes it in English.

        Yields:
            the transcript so far: after each part, and several times per second, so that the caller may stop at any
            time; the last one is complete.

        Raises:
            BadInput: the recording cannot be read, is too long, or has no speech in it; the model does not support the
                language.
        """
        language = self._checked(language, task)
        samples = read_audio(path)
        if len(samples) < MIN_SECONDS * SAMPLE_RATE or np.abs(samples).max() < SILENT_LEVEL:
            raise _no_speech()
        self.load()
        assert self._listen
        transcript = None
        with closing(self._listen(samples, language, task)) as parts:  # type: ignore[type-var]
            for transcript in parts:
                if transcript.progress < 1:
                    yield transcript
        if not transcript or not any(character.isalnum() for character in transcript.text):
            raise _no_speech()
        yield transcript

    def _checked(self, language: str | None, task: str) -> str | None:
        """The code of the language to listen for; None to detect it."""
        if task not in TASKS:
            raise BadInput(f"The task must be one of {', '.join(TASKS)}, not '{task}'.")
        if not language:
            return self.preset.language
        code = language_code(language)
        if code not in self.languages:
            other = "turbo" if code == CANTONESE else "base"
            title = whisper_languages()[code]
            raise BadInput(f"This speech model does not support {title}. Choose another, such as --speech {other}.")
        return code


@cache
def whisper_languages() -> dict[str, str]:
    """The languages of all Whisper models, code -> English name, in the order of the hours of training data."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    return {code: name.title() for code, name in LANGUAGES.items()}


def language_code(name: str) -> str:
    """The code of a language given by code or English name.

    Raises:
        BadInput: Whisper does not know the language.
    """
    known = whisper_languages()
    names = {title.lower(): code for code, title in known.items()}
    code = name if name in known else names.get(name.strip().lower(), name.strip().lower())
    if code not in known:
        raise BadInput(f"There is no language '{name}' in Whisper. Name one such as English, German or ja.")
    return code


def _faster_whisper(preset: SpeechPreset, folder: Path) -> Listen:
    """Loads a model in CTranslate2's format with int8 weights."""
    import torch
    from faster_whisper import WhisperModel

    class Recognizer(WhisperModel):
        """Whisper that encodes short recordings as such, without padding them to WINDOW seconds.

        The last window is cached, so detecting its language and transcribing it encode once.
        """

        last: tuple[Any, Any] = (None, None)  # features, [mels, frames], and what they were encoded to

        def encode(self, features: np.ndarray) -> Any:
            features = _trimmed(features)
            encoded_features, encoded = self.last
            if encoded_features is None or not np.array_equal(encoded_features, features):
                encoded = super().encode(features)
                self.last = features, encoded
            return encoded

    options = {"compute_type": "int8", "cpu_threads": preset.threads, "local_files_only": True}
    cores = torch.get_num_threads()
    # A single-threaded model transcribes several parts in parallel; each worker takes extra memory.
    workers = min(cores, MAX_WORKERS) if preset.threads == 1 else 1
    try:
        model = Recognizer(str(folder), device="cpu", num_workers=workers, **options)
    except (RuntimeError, ValueError, OSError) as error:  # of CTranslate2 and its tokenizer
        name = getattr(preset.source, "name", "The speech model")
        raise WeightsError(
            f"{name} is not a Whisper model in CTranslate2's format, or is damaged. Name a size, such as --speech "
            "small, or a repository such as Systran/faster-whisper-small."
        ) from error
    torch.set_num_threads(cores)  # loading CTranslate2 changes it

    def listen(samples: np.ndarray, language: str | None, task: str) -> Iterator[Transcript]:
        is_stopped = Event()

        def transcribe_part(part: slice) -> list[SpeechSegment]:
            # The VAD filter drops silence, on which Whisper hallucinates.
            found, _ = model.transcribe(
                samples[part], language=language, task=task, vad_filter=True, condition_on_previous_text=False
            )
            start, segments = part.start / SAMPLE_RATE, []
            for one in found:  # each call of the model gives some
                segments.append(speech_segment(start + one.start, start + one.end, one.text, one.compression_ratio))
                if is_stopped.is_set():
                    break
            return segments

        pool = ThreadPoolExecutor(workers)
        try:
            so_far = Transcript("", language or "", (), 0.0)
            parts = yield from _awaited(pool.submit(_parts, samples), so_far)
            if not language and parts:
                language = yield from _awaited(pool.submit(_detect, model, samples[parts[0]]), so_far)
            segments: list[SpeechSegment] = []
            for part, found in [(part, pool.submit(transcribe_part, part)) for part in parts]:
                segments += yield from _awaited(found, so_far)
                so_far = _transcript(segments, str(language), 1.0 if part is parts[-1] else part.stop / len(samples))
                yield so_far
        finally:
            is_stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)

    return listen


def _trimmed(features: np.ndarray) -> np.ndarray:
    """Drops padding, [mels, frames], but for SILENCE seconds: without any, Whisper may repeat the last words."""
    sound = np.flatnonzero(features.any(axis=0))  # padded frames are 0
    end = (sound[-1] + 1 if len(sound) else 0) + SILENCE * FRAME_RATE
    return np.ascontiguousarray(features[:, : end + end % 2])  # the encoder halves the frames


def _awaited(result: Future[T], so_far: Transcript) -> Generator[Transcript, None, T]:
    """Yields the transcript so far until the result of a thread is there, and returns the result."""
    while wait([result], POLL_SECONDS).not_done:
        yield so_far
    return result.result()


def _detect(model: WhisperModel, samples: np.ndarray) -> str:
    """The most probable language; English unless another one is far more probable, for English with an accent."""
    if not model.model.is_multilingual:
        return "en"
    from faster_whisper.vad import collect_chunks, get_speech_timestamps

    speech, _ = collect_chunks(samples, get_speech_timestamps(samples))
    features = model.feature_extractor(np.concatenate(speech))  # [mels, frames]
    # Drop the last frame, as transcription does, so both encode the same features and the second call hits the cache.
    language, _, probabilities = model.detect_language(features=features[:, :-1])
    likely = dict(probabilities)
    return str(language) if likely[language] > ENGLISH_PRIOR * likely["en"] else "en"


def _parts(samples: np.ndarray) -> list[slice]:
    """Splits a recording into parts of at most WINDOW seconds: a long one at pauses, without its silence.

    Without speech there are none.
    """
    from faster_whisper.vad import VadOptions, get_speech_timestamps

    found = get_speech_timestamps(samples, VadOptions(max_speech_duration_s=WINDOW))
    if found and len(samples) <= WINDOW * SAMPLE_RATE:
        return [slice(0, len(samples))]
    parts: list[slice] = []
    for speech in found:
        start, end = speech["start"], speech["end"]
        if parts and end - parts[-1].start <= WINDOW * SAMPLE_RATE:
            start = parts.pop().start
        parts.append(slice(start, end))
    return parts


def _openai_whisper(preset: SpeechPreset, path: Path) -> Listen:
    """Loads a .pt checkpoint of OpenAI's package, original or fine-tuned."""
    import torch

    try:
        from whisper.model import ModelDimensions, Whisper
    except ImportError as error:
        raise AssetError("A Whisper checkpoint needs one more package: pip install openai-whisper") from error
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # unpickles tensors only, runs no code
        model = Whisper(ModelDimensions(**checkpoint["dims"]))
        model.load_state_dict(checkpoint["model_state_dict"])
    except Exception as error:  # torch.load raises almost anything
        raise WeightsError(f"{path.name} is not a Whisper checkpoint, or is damaged. Name another file.") from error
    model.eval()

    def listen(samples: np.ndarray, language: str | None, task: str) -> Iterator[Transcript]:
        from faster_whisper.vad import get_speech_timestamps

        if not get_speech_timestamps(samples):
            raise _no_speech()
        language = language or (None if model.is_multilingual else "en")
        result = model.transcribe(samples, language=language, task=task, fp16=False, condition_on_previous_text=False)
        segments = [
            speech_segment(part["start"], part["end"], part["text"], part["compression_ratio"])
            for part in result["segments"]
        ]
        yield _transcript(segments, result["language"])

    return listen


def speech_segment(start: float, end: float, text: str, compression_ratio: float) -> SpeechSegment:
    """A segment as Whisper gives it, with repetition loops collapsed."""
    text = text.strip()
    return SpeechSegment(start, end, without_loops(text) if compression_ratio > MAX_COMPRESSION_RATIO else text)


def without_loops(text: str) -> str:
    """Collapses a phrase repeated four or more times in a row: a hallucination of Whisper's."""
    return re.sub(r"(?i)(?<!\w)(\w.{0,80}?)(?:\W+\1(?!\w)){3,}", r"\1", text)


def _transcript(segments: list[SpeechSegment], language: str, progress: float = 1.0) -> Transcript:
    return Transcript(" ".join(one.text for one in segments).strip(), language, tuple(segments), progress)


def find_speech_model(name: str) -> SpeechPreset:
    """Finds a Whisper model by name.

    Args:
        name: a size such as "base" or "small", a repository or folder in CTranslate2's format, or OpenAI's .pt file.

    Raises:
        BadInput: there is no such model.
    """
    if name.endswith(".pt"):
        if not Path(name).is_file():
            raise BadInput(f"There is no file {Path(name).name}.")
        return SpeechPreset(Path(name), language=None)
    if name in OFFLINE_SPEECH:
        return OFFLINE_SPEECH[name]
    language = "en" if name.endswith(".en") else None
    if "/" in name or Path(name).is_dir():
        return SpeechPreset(HubRepository(name), language)
    from faster_whisper import available_models

    if name not in available_models():
        raise BadInput(f"There is no Whisper model '{name}'. The sizes are {', '.join(available_models())}.")
    return SpeechPreset(HubRepository(_repository(name)), language, threads=1 if name.startswith("tiny") else 0)


def _repository(size: str) -> str:
    distilled = "distil-" if size.startswith("distil-") else ""
    return REPOSITORIES.get(size) or f"Systran/faster-{distilled}whisper-{size.removeprefix('distil-')}"


def _no_speech() -> BadInput:
    return BadInput("I heard no speech in that recording. Please speak a little longer or closer to the microphone.")
