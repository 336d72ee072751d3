"""Text → speech, with hibari: a small American English voice distilled from Kokoro-82M (Apache-2.0).

https://github.com/MMWilliams/hibari
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import wave
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Lock, Thread, get_native_id
from typing import Any

import numpy as np

from ..errors import BadInput
from .spoken_text import sentences

logger = logging.getLogger(__name__)

SAMPLE_RATE = 24_000  # Hz
PAUSE = 0.15  # seconds of silence after a sentence
MIN_KNOWN = 0.75  # share of a sentence's words in the English lexicon, below which it is taken for another language
# Words that English sentences use all the time, and that other languages in Latin script do not.
ENGLISH = frozenset("the with this that these you from they which there what your its".split())
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
NICENESS = 15  # of the thread that speaks beside an answer, above that of the process
NO_VOICE = BadInput("I can only speak English; for other languages there is no voice.")


@dataclass(frozen=True)
class SpokenSentence:
    """A sentence and its sound: float32 samples in −1 to 1, [n], and their rate in Hz."""

    text: str
    samples: np.ndarray
    rate: int = SAMPLE_RATE


class Voice:
    """An English voice on one CPU thread, loaded on first use. Threads may share it."""

    def __init__(self) -> None:
        self._loading = Lock()
        self._model: Any = None

    def load(self) -> None:
        """Loads the voice if it is not loaded yet; it comes with its package and needs no network."""
        with self._loading:
            if self._model is None:
                from hibari import Hibari

                model = Hibari(threads=1)
                model("Ready.")  # loads the lexicon
                self._model = model

    def speak(self, text: str) -> tuple[np.ndarray, int]:
        """Reads a text aloud, Markdown as a person would read it.

        Returns:
            float32 samples in −1 to 1, [n], and their rate in Hz.

        Raises:
            BadInput: there is nothing to say, or the text is not in English.
        """
        spoken = list(self.read_aloud([text]))
        if not spoken:
            raise BadInput("There is nothing to read aloud.")
        return np.concatenate([sentence.samples for sentence in spoken]), SAMPLE_RATE

    def read_aloud(self, pieces: Iterable[str]) -> Iterator[SpokenSentence]:
        """Reads a text aloud while it is being written, sentence by sentence.

        Args:
            pieces: of the text, as ``Engine.reply`` yields them.

        Yields:
            each sentence as soon as the next one begins.

        Raises:
            BadInput: the text is not in English.
        """
        reader = Reader(self)
        for piece in pieces:
            yield from reader.feed(piece)
        yield from reader.finish()

    def say(self, sentence: str) -> SpokenSentence:
        """Speaks one sentence of plain text.

        Raises:
            BadInput: the sentence is not in English.
        """
        self.load()
        if not self.is_english(sentence):
            raise NO_VOICE
        samples = self._model(sentence, seed=0)  # fixed: the same text always gives the same audio
        return SpokenSentence(sentence, np.concatenate([samples, np.zeros(int(PAUSE * SAMPLE_RATE), np.float32)]))

    def is_english(self, sentence: str) -> bool:
        """Whether a sentence is in English, by its words. Names and numbers alone count as English."""
        self.load()
        letters = [character for character in sentence if character.isalpha()]
        if sum(character.isascii() for character in letters) < len(letters) / 2:
            return False  # another script
        words = [word for word in WORD.findall(sentence) if not word.isupper()]  # abbreviations are in no lexicon
        if len(words) < 3:
            words = [word for word in words if word.islower()]  # the others may be names
        if not words or ENGLISH.intersection(word.lower() for word in words):
            return True
        return sum(map(self._is_known, words)) >= MIN_KNOWN * len(words)

    def _is_known(self, word: str) -> bool:
        known, word = self._model.g2p.lexicon.golds, word.replace("’", "'")
        stem = re.sub(r"ies$", "y", word.lower())
        return any(form in known for form in (word, word.lower(), stem, re.sub(r"('s|s|es|d|ed|ing)$", "", stem)))


class Reader:
    """Reads one answer aloud while it is being written: ``feed`` and ``finish`` yield the sentences that are complete.

    A sentence is complete when the next one has begun: until then its Markdown may change what it means.
    """

    def __init__(self, voice: Voice):
        self.voice = voice
        self._text, self._said = "", 0

    def feed(self, piece: str) -> Iterator[SpokenSentence]:
        """Takes in more text and yields what can be said now."""
        self._text += piece
        if re.search(r"[.!?…:\n]\s*\S", self._text[-len(piece) - 3 :]) or "\n" in piece:
            yield from self._say(sentences(self._text)[:-1])

    def finish(self) -> Iterator[SpokenSentence]:
        """Yields the rest."""
        yield from self._say(sentences(self._text))

    def _say(self, complete: list[str]) -> Iterator[SpokenSentence]:
        while self._said < len(complete):
            sentence = complete[self._said]
            self._said += 1
            yield self.voice.say(sentence)


class BackgroundReader:
    """Reads one answer aloud in a background thread while the rest of it is still being generated.

    The thread has a low priority, so it takes what the generation leaves of the cores.

    Args:
        read_aloud: of an engine or a voice.
    """

    def __init__(self, read_aloud: Callable[[Iterable[str]], Iterator[SpokenSentence]]):
        self._read_aloud = read_aloud
        self._pieces: Queue[str | None] = Queue()
        self._spoken: Queue[SpokenSentence | BadInput | None] = Queue()
        self._is_closed = False
        Thread(target=self._run, daemon=True).start()

    def feed(self, piece: str) -> None:
        """Takes in more text."""
        self._pieces.put(piece)

    def finish(self) -> None:
        """Signals the end of the text."""
        self._pieces.put(None)

    def ready(self) -> Iterator[SpokenSentence]:
        """Yields the sentences that were spoken by now, without waiting.

        Raises:
            BadInput: the text is not in English; it is raised once.
        """
        while not self._spoken.empty() and (found := self._take()) is not None:
            yield found

    def rest(self) -> Iterator[SpokenSentence]:
        """Waits for the remaining sentences of a finished text; raises as ``ready`` does."""
        while (found := self._take()) is not None:
            yield found

    def close(self) -> None:
        """Stops reading after the current sentence."""
        self._is_closed = True
        self.finish()

    def _take(self) -> SpokenSentence | None:
        found = self._spoken.get()
        if found is None:
            self._spoken.put(None)  # keep the sentinel for later calls
        if isinstance(found, BadInput):
            raise found
        return found

    def _run(self) -> None:
        _lower_priority()
        try:
            with closing(self._read_aloud(iter(self._pieces.get, None))) as spoken:  # type: ignore[type-var]
                for sentence in spoken:
                    if self._is_closed:
                        break
                    self._spoken.put(sentence)
        except BadInput as error:
            self._spoken.put(error)
        except Exception:  # a sentence that the voice fails on must not end the answer
            logger.exception("voice")
        self._spoken.put(None)


def _lower_priority() -> None:
    """Lowers the priority of the current thread. Only on Linux: elsewhere, a thread has no niceness of its own."""
    if sys.platform == "linux":
        thread = get_native_id()
        with suppress(OSError):  # a sandbox may forbid it
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)


def write_wav(path: str | Path, samples: np.ndarray, rate: int) -> None:
    """Writes samples as 16-bit mono WAV.

    Raises:
        BadInput: the file cannot be written.
    """
    try:
        Path(path).write_bytes(wav_bytes(samples, rate))
    except OSError as error:
        raise BadInput(f"{Path(path).name} cannot be written: {error.strerror}.") from error


def wav_bytes(samples: np.ndarray, rate: int) -> bytes:
    """Samples as a 16-bit mono WAV file."""
    data = io.BytesIO()
    with wave.open(data, "wb") as sink:
        sink.setnchannels(1)
        sink.setsampwidth(2)
        sink.setframerate(rate)
        sink.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return data.getvalue()
