"""Speech in and out, as every engine offers it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ..conversation import Transcript
from .speech_recognition import SpeechRecognizer
from .text_to_speech import SpokenSentence, Voice


class SpeechMixin:
    """Speech, which engines share: ``speech_recognizer`` and ``voice``, both on this machine."""

    speech_recognizer: SpeechRecognizer
    voice: Voice

    def load_speech(self) -> None:
        """Loads the speech model, which would otherwise load at the first recording.

        Raises:
            MmchatError: it is not available, or damaged.
        """
        self.speech_recognizer.load()

    @property
    def languages(self) -> dict[str, str]:
        """The languages that ``transcribe`` supports, code -> English name."""
        return self.speech_recognizer.languages

    def transcribe(self, path: str | Path, language: str | None = None, task: str = "transcribe") -> Transcript:
        """Transcribes a recording of any container, sample rate and number of channels.

        Args:
            language: a code or an English name, such as "de" or "German"; detected from the recording if None.
            task: "transcribe" writes what is said; "translate" writes it in English.

        Raises:
            BadInput: the recording cannot be read or has no speech in it, or the model does not support the language.
        """
        return self.speech_recognizer.transcribe(path, language, task)

    def listen(self, path: str | Path, language: str | None = None, task: str = "transcribe") -> Iterator[Transcript]:
        """Transcribes a recording part by part, see ``SpeechRecognizer.listen``."""
        return self.speech_recognizer.listen(path, language, task)

    def speak(self, text: str) -> tuple[np.ndarray, int]:
        """Reads a text aloud: float32 samples in −1 to 1, [n], and their rate in Hz.

        Raises:
            BadInput: there is nothing to say, or the text is not in English.
        """
        return self.voice.speak(text)

    def read_aloud(self, pieces: Iterable[str]) -> Iterator[SpokenSentence]:
        """Reads a text aloud while it is being written, see ``Voice.read_aloud``."""
        return self.voice.read_aloud(pieces)
