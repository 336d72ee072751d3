"""Messages, sampling options, transcripts, and the interface of an engine.

Plain data, without torch, so the page and the model server's client start fast.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from .errors import BadInput

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image

    from .models.text_to_speech import SpokenSentence

logger = logging.getLogger(__name__)

ImageSource: TypeAlias = "str | Path | PIL.Image.Image"

ROLES = ("system", "user", "assistant")
MAX_QUESTION = 4_000  # characters; neither the page nor the API takes a longer one
ORDINALS = ("first", "second", "third", "fourth", "fifth")
NAMED_IMAGE = re.compile(
    rf"\b(?:picture|image|photo) (?:number )?(\d{{1,2}})\b|\b({'|'.join(ORDINALS)}) (?:picture|image|photo)\b",
    re.IGNORECASE,
)
SEVERAL_IMAGES = re.compile(r"\b(?:pictures|images|photos|both|others?|all|same|different)\b", re.IGNORECASE)
DEFAULT_QUESTION = "Describe the image."  # for an image without a question
TEXT_PENALTY = 1.1  # repetition penalty of text-only conversations

# The base model does not see the picture, so it must not add facts or answer the question again.
REWRITE = """Question: {question}
Draft answer: {draft}

Rewrite the draft answer in clear, correct English. Keep its meaning, and add no facts. Write the new answer only."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
        text: what is said.
        images: paths or decoded PIL images; the model reads them before the text.
    """

    role: str
    text: str
    images: Sequence[ImageSource] = field(default=())

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"The role of a message must be one of {', '.join(ROLES)}, not '{self.role}'")
        if isinstance(self.images, (str, bytes, Path)):
            raise ValueError("images must be a list; wrap a single image in one: images=[image]")
        object.__setattr__(self, "images", tuple(self.images))


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen.

    Attributes:
        temperature: 0 always picks the likeliest token; higher values give more varied answers.
        top_p: nucleus sampling, from the smallest set of tokens whose probabilities reach this sum (Holtzman et al.
            2020, arXiv 1904.09751).
        max_new_tokens: maximum length of an answer.
        repetition_penalty: above 1, tokens already in the answer become less likely (Keskar et al. 2019,
            arXiv 1909.05858). None lets the engine choose: 1 with images, whose descriptions rightly repeat "a" and
            "in", and TEXT_PENALTY without, where a small model tends to loop.
        no_repeat_ngram_size: no sequence of that many tokens occurs twice in an answer (Paulus et al. 2017,
            arXiv 1705.04304); 0 turns it off. None lets the engine choose: the preset's with images, 0 without.
        beams: above 1, beam search with that many beams. The answer then comes all at once, and temperature and top_p
            are ignored.
        seed: makes a sampled answer reproducible.
    """

    temperature: float = 0.2
    top_p: float = 0.9
    max_new_tokens: int = 256
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    beams: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 5:
            raise BadInput("The temperature must be between 0 and 5.")
        if not 0 < self.top_p <= 1:
            raise BadInput("Top-p must be above 0 and at most 1.")
        if not 1 <= self.max_new_tokens <= 4096:
            raise BadInput("The maximum length of an answer must be between 1 and 4096 tokens.")
        if self.repetition_penalty is not None and not 0.5 <= self.repetition_penalty <= 3:
            raise BadInput("The repetition penalty must be between 0.5 and 3.")
        if self.no_repeat_ngram_size is not None and self.no_repeat_ngram_size < 0:
            raise BadInput("The size of n-grams that may not repeat must be 0 or more.")
        if not 1 <= self.beams <= 16:
            raise BadInput("The number of beams must be between 1 and 16.")


@dataclass(frozen=True)
class SpeechSegment:
    """A stretch of speech; start and end in seconds."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Transcript:
    """What is said in a recording."""

    text: str
    language: str  # Whisper's code of the spoken language, such as "en", also where the text is a translation
    segments: tuple[SpeechSegment, ...]
    progress: float = 1.0  # share of the recording that has been transcribed; below 1 until it is complete


class Engine(Protocol):
    """What the page, the terminal and the API talk to: local models, or a model server.

    A reply is a generator. Closing it stops generation. An engine may also have ``details``, ``count_tokens`` and
    ``prefill``, as ``LocalEngine`` does; callers check whether it does.
    """

    @property
    def about(self) -> str:
        """Which models answer, and why they were chosen, in a few sentences."""

    def warm_up(self) -> None:
        """Fetches all models, and loads those that every visitor needs."""

    def load_speech(self) -> None:
        """Loads the speech model, which would otherwise load at the first recording."""

    @property
    def languages(self) -> dict[str, str]:
        """The languages that ``transcribe`` supports, code -> English name."""

    @property
    def answers_in(self) -> tuple[str, ...]:
        """The languages of the model that answers, as codes; empty if they are not known."""

    def transcribe(self, path: str | Path, language: str | None = None, task: str = "transcribe") -> Transcript:
        """Transcribes a recording."""

    def listen(self, path: str | Path, language: str | None = None, task: str = "transcribe") -> Iterator[Transcript]:
        """Transcribes a recording part by part."""

    def speak(self, text: str) -> tuple[np.ndarray, int]:
        """Reads a text aloud: samples and their rate."""

    def read_aloud(self, pieces: Iterable[str]) -> Iterator[SpokenSentence]:
        """Reads a text aloud while it is being written, sentence by sentence."""

    def reply(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> Iterator[str]:
        """Streams the answer to a conversation."""

    def rewrite(self, question: str, draft: str, options: SamplingOptions | None = None) -> Iterator[str]:
        """Streams a draft answer in better English."""


def has_images(messages: Sequence[Message]) -> bool:
    """Whether any message of the conversation has an image."""
    return any(message.images for message in messages)


def with_question(messages: Sequence[Message]) -> list[Message]:
    """Checks that a conversation ends with a question; an image without text gets DEFAULT_QUESTION.

    Raises:
        BadInput: there is no question.
    """
    if not messages or messages[-1].role != "user":
        raise BadInput("Please ask a question.")
    *earlier, question = messages
    if not question.text.strip():
        if not question.images:
            raise BadInput("Please type or speak a question.")
        question = Message("user", DEFAULT_QUESTION, question.images)
    return [*earlier, question]


def with_named_image(messages: Sequence[Message]) -> list[Message]:
    """Leaves out the images that a question is not about, if it names one of several: "picture 2", "the first photo".

    The images are those of the latest message with any. A question that may compare them keeps all.
    """
    text = messages[-1].text
    named = {_image_number(*found) for found in NAMED_IMAGE.findall(text)}
    shown = max((index for index, message in enumerate(messages) if message.images), default=None)
    if len(named) != 1 or shown is None or SEVERAL_IMAGES.search(text):
        return list(messages)
    images, number = messages[shown].images, named.pop()
    if len(images) < 2 or not 1 <= number <= len(images):
        return list(messages)
    only = replace(messages[shown], images=[images[number - 1]])
    return [*messages[:shown], only, *messages[shown + 1 :]]


def _image_number(digits: str, ordinal: str) -> int:
    return int(digits) if digits else ORDINALS.index(ordinal.lower()) + 1


def rewrite_request(question: str, draft: str) -> Message:
    """The prompt that asks the base model to put a draft answer into better English."""
    return Message("user", REWRITE.format(question=question.strip() or DEFAULT_QUESTION, draft=draft.strip()))


def dialogue_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """Groups messages into turns: each question with the answers that follow it."""
    turns: list[list[Message]] = []
    for message in messages:
        if message.role == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return turns
