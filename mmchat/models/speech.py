"""Recording → text, with Whisper (Radford et al. 2022, arXiv 2212.04356)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from threading import Lock

import numpy as np

from ..conversation import SpeechSegment, Transcript
from ..errors import AssetError, BadInput, WeightsError
from ..fetching import fetch
from ..fetching.sources import HubRepository
from ..media import SAMPLE_RATE, read_audio
from ..presets import SpeechPreset

# Whisper sizes whose repository does not follow the naming rule of _repository.
REPOSITORIES = {
    "large": "Systran/faster-whisper-large-v3",
    "large-v3-turbo": "mobiuslabsgmbh/faster-whisper-large-v3-turbo",
    "turbo": "mobiuslabsgmbh/faster-whisper-large-v3-turbo",
    "distil-large-v3.5": "distil-whisper/distil-large-v3.5-ct2",
}
WINDOW = 30  # seconds; Whisper's input length
MAX_WORKERS = 4  # parts of a recording transcribed in parallel
MIN_SECONDS = 0.1
SILENT_LEVEL = 1e-3  # peak amplitude, full scale 1; a quiet voice peaks fifty times higher


class SpeechRecognizer:
    """A Whisper model on the CPU, loaded on first use."""

    def __init__(self, preset: SpeechPreset):
        self.preset = preset
        self._loading = Lock()
        self._transcribe: Callable[[np.ndarray], Transcript] | None = None

    def load(self) -> None:
        """Loads the model if it is not loaded yet.

        Raises:
            AssetError: the model or a package it needs is not available.
            WeightsError: the checkpoint is damaged.
        """
        with self._loading:
            if self._transcribe is None:
                path = fetch(self.preset.source)
                load = _openai_whisper if path.suffix == ".pt" else _faster_whisper
                self._transcribe = load(self.preset, path)

    def transcribe(self, path: str | Path) -> Transcript:
        """Transcribes a recording.

        Raises:
            BadInput: the recording cannot be read, is too long, or has no speech in it.
        """
        samples = read_audio(path)
        if len(samples) < MIN_SECONDS * SAMPLE_RATE or np.abs(samples).max() < SILENT_LEVEL:
            raise _no_speech()
        self.load()
        assert self._transcribe
        transcript = self._transcribe(samples)
        if not any(character.isalnum() for character in transcript.text):
            raise _no_speech()
        return transcript


def _faster_whisper(preset: SpeechPreset, folder: Path) -> Callable[[np.ndarray], Transcript]:
    """Loads a model in CTranslate2's format with int8 weights."""
    import torch
    from faster_whisper import WhisperModel

    options = {"compute_type": "int8", "cpu_threads": preset.threads, "local_files_only": True}
    cores = torch.get_num_threads()
    # A single-threaded model transcribes several parts in parallel; each worker takes extra memory.
    workers = min(cores, MAX_WORKERS) if preset.threads == 1 else 1
    model = WhisperModel(str(folder), device="cpu", num_workers=workers, **options)
    torch.set_num_threads(cores)  # loading CTranslate2 changes it

    def transcribe(samples: np.ndarray) -> Transcript:
        parts = _parts(samples)
        language = preset.language or "en"
        if not preset.language and model.model.is_multilingual and parts:
            language, *_ = model.detect_language(samples[parts[0]])

        def transcribe_part(part: slice) -> list[tuple[float, float, str]]:
            # The VAD filter drops silence, on which Whisper hallucinates.
            found, _ = model.transcribe(
                samples[part], language=language, vad_filter=True, condition_on_previous_text=False
            )
            start = part.start / SAMPLE_RATE
            return [(start + segment.start, start + segment.end, segment.text) for segment in found]

        with ThreadPoolExecutor(workers) as pool:
            return _transcript(chain.from_iterable(pool.map(transcribe_part, parts)), language)

    return transcribe


def _parts(samples: np.ndarray) -> list[slice]:
    """Splits a recording into parts of at most WINDOW seconds: a long one at pauses, without its silence."""
    from faster_whisper.vad import VadOptions, get_speech_timestamps

    if len(samples) <= WINDOW * SAMPLE_RATE:
        return [slice(0, len(samples))]
    parts: list[slice] = []
    for speech in get_speech_timestamps(samples, VadOptions(max_speech_duration_s=WINDOW)):
        start, end = speech["start"], speech["end"]
        if parts and end - parts[-1].start <= WINDOW * SAMPLE_RATE:
            start = parts.pop().start
        parts.append(slice(start, end))
    return parts


def _openai_whisper(preset: SpeechPreset, path: Path) -> Callable[[np.ndarray], Transcript]:
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

    def transcribe(samples: np.ndarray) -> Transcript:
        from faster_whisper.vad import get_speech_timestamps

        if not get_speech_timestamps(samples):
            raise _no_speech()
        language = preset.language or (None if model.is_multilingual else "en")
        result = model.transcribe(samples, language=language, fp16=False, condition_on_previous_text=False)
        segments = [(part["start"], part["end"], part["text"]) for part in result["segments"]]
        return _transcript(segments, result["language"])

    return transcribe


def _transcript(parts: Iterable[tuple[float, float, str]], language: str) -> Transcript:
    segments = tuple(SpeechSegment(start, end, text.strip()) for start, end, text in parts)
    return Transcript(" ".join(segment.text for segment in segments).strip(), language, segments)


def find_speech_model(name: str) -> SpeechPreset:
    """Finds a Whisper model by name.

    Args:
        name: a size such as "base.en", a repository or folder in CTranslate2's format, or OpenAI's .pt file.

    Raises:
        BadInput: there is no such model.
    """
    from faster_whisper import available_models

    if name.endswith(".pt"):
        if not Path(name).is_file():
            raise BadInput(f"There is no file {Path(name).name}.")
        return SpeechPreset(Path(name), language=None)
    language = "en" if name.endswith(".en") else None
    if "/" in name or Path(name).is_dir():
        return SpeechPreset(HubRepository(name), language)
    if name not in available_models():
        raise BadInput(f"There is no Whisper model '{name}'. The sizes are {', '.join(available_models())}.")
    return SpeechPreset(HubRepository(_repository(name)), language, threads=1 if name.startswith("tiny") else 0)


def _repository(size: str) -> str:
    distilled = "distil-" if size.startswith("distil-") else ""
    return REPOSITORIES.get(size) or f"Systran/faster-{distilled}whisper-{size.removeprefix('distil-')}"


def _no_speech() -> BadInput:
    return BadInput("I heard no speech in that recording. Please speak a little longer or closer to the microphone.")
