"""Recording → text, with Whisper (Radford et al. 2022, arXiv 2212.04356) through faster-whisper."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .assets import fetch
from .errors import BadInput
from .hub import fetch_repository
from .presets import HubRepository, SpeechPreset

SAMPLE_RATE = 16_000  # Hz, what Whisper was trained on
MIN_SECONDS = 0.1
MAX_SECONDS = 600
SILENT_LEVEL = 1e-3  # peak of a full scale of 1; a quiet voice peaks fifty times higher


@dataclass(frozen=True)
class SpeechSegment:
    """A stretch of speech; start and end in seconds."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """What was said."""

    text: str
    language: str  # two letters, as "en"
    segments: tuple[SpeechSegment, ...]


def read_audio(path: str | Path) -> np.ndarray:
    """Samples of any container that PyAV reads (of a video, its sound): 16 kHz, mono, float32 in −1 to 1.

    Raises:
        BadInput: the file is missing, holds no sound, or is damaged.
    """
    from av.error import FFmpegError
    from faster_whisper.audio import decode_audio

    try:
        return decode_audio(str(path), sampling_rate=SAMPLE_RATE)
    except FileNotFoundError as error:
        raise BadInput(f"There is no recording '{Path(path).name}'.") from error
    except (FFmpegError, IndexError, ValueError, OSError) as error:
        raise BadInput("That file is not a recording I can read. Please send WAV, MP3, FLAC, OGG or WebM.") from error


class SpeechRecognizer:
    """A Whisper model in memory, on the CPU with 8-bit weights."""

    def __init__(self, preset: SpeechPreset):
        from faster_whisper import WhisperModel

        self.preset = preset
        is_on_hub = isinstance(preset.source, HubRepository)
        folder = fetch_repository(preset.source) if is_on_hub else fetch(preset.source)[0].parent
        self.model = WhisperModel(str(folder), device="cpu", compute_type="int8", local_files_only=True)

    def transcribe(self, path: str | Path) -> Transcript:
        """What is said in a recording.

        Raises:
            BadInput: it cannot be read, is too long, or there is no speech in it.
        """
        samples = read_audio(path)
        if len(samples) < MIN_SECONDS * SAMPLE_RATE or np.abs(samples).max() < SILENT_LEVEL:
            raise _no_speech()
        if len(samples) > MAX_SECONDS * SAMPLE_RATE:
            raise BadInput(f"That recording is too long. Please send at most {MAX_SECONDS // 60} minutes.")
        # The voice filter drops silence first: on silence Whisper makes words up.
        found, info = self.model.transcribe(
            samples, language=self.preset.language, vad_filter=True, condition_on_previous_text=False
        )
        spoken = tuple(SpeechSegment(part.start, part.end, part.text.strip()) for part in found)
        text = " ".join(part.text for part in spoken).strip()
        if not any(character.isalnum() for character in text):
            raise _no_speech()
        return Transcript(text, info.language, spoken)


def _no_speech() -> BadInput:
    return BadInput("I heard no speech in that recording. Please speak a little longer or closer to the microphone.")
