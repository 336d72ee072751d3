"""What goes into an engine and what comes out: messages, options, transcripts, and the engine's interface.

Plain data that imports no torch, so the page and the model server's client need not wait for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .errors import BadInput

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant")
DEFAULT_QUESTION = "Describe the image."  # for a picture that comes without words
TEXT_PENALTY = 1.1

# The base model has not seen the picture: it must neither add to what the draft says nor answer the question anew.
REWRITE = """Question: {question}
Draft answer: {draft}

Rewrite the draft answer in clear, correct English. Keep its meaning, and add no facts. Write the new answer only."""


@dataclass(frozen=True)
class Message:
    """One turn: who speaks, what they say, and the pictures they show with it.

    ``images`` are paths or decoded PIL pictures; they stand before the text.
    """

    role: str
    text: str
    images: Sequence[Any] = field(default=())

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"A message's role is one of {', '.join(ROLES)}, not '{self.role}'")
        if isinstance(self.images, (str, bytes, Path)):
            raise ValueError("images is a list of pictures; put the single picture into one: images=[picture]")
        object.__setattr__(self, "images", tuple(self.images))


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token every time; higher is more varied.
        top_p: sample from the smallest set of tokens whose probabilities reach this sum (Holtzman et al. 2020,
            arXiv 1904.09751).
        max_new_tokens: the longest answer.
        repetition_penalty: above 1, tokens already in the answer become less likely (Keskar et al. 2019,
            arXiv 1909.05858). None: the engine takes 1 about pictures, whose descriptions rightly repeat "a" and "in",
            and TEXT_PENALTY without, where a small model would go round in circles.
        beams: above 1, beam search for the likeliest whole answer with so many beams; the answer comes in one piece,
            and temperature and top_p do not count.
        seed: makes a sampled answer repeatable.
    """

    temperature: float = 0.2
    top_p: float = 0.9
    max_new_tokens: int = 256
    repetition_penalty: float | None = None
    beams: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 5:
            raise BadInput("The temperature must lie between 0 and 5.")
        if not 0 < self.top_p <= 1:
            raise BadInput("Top-p must be above 0 and at most 1.")
        if not 1 <= self.max_new_tokens <= 4096:
            raise BadInput("The longest answer must have between 1 and 4096 tokens.")
        if self.repetition_penalty is not None and not 0.5 <= self.repetition_penalty <= 3:
            raise BadInput("The repetition penalty must lie between 0.5 and 3.")
        if not 1 <= self.beams <= 16:
            raise BadInput("The number of beams must lie between 1 and 16.")


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
    language: str  # two letters, as "en"
    segments: tuple[SpeechSegment, ...]


class Engine(Protocol):
    """What the page, the terminal and the API talk to: models here, or a model server.

    A reply is a generator. Closing it stops the work.
    """

    @property
    def about(self) -> str:
        """What answers here, and why, in a few sentences."""

    def warm_up(self) -> None:
        """Loads what would otherwise load when it is first needed."""

    def transcribe(self, path: str | Path) -> Transcript:
        """What is said in a recording."""

    def reply(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> Iterator[str]:
        """The answer to a conversation, in pieces as they are written."""

    def rewrite(self, question: str, draft: str, options: SamplingOptions | None = None) -> Iterator[str]:
        """A draft answer in better English, in pieces."""


def has_images(messages: Sequence[Message]) -> bool:
    """Whether a picture is shown anywhere in the conversation."""
    return any(message.images for message in messages)


def with_question(messages: Sequence[Message]) -> list[Message]:
    """The conversation with a question at its end.

    Raises:
        BadInput: there is none.
    """
    if not messages or messages[-1].role != "user":
        raise BadInput("Please ask a question.")
    *earlier, question = messages
    if not question.text.strip():
        if not question.images:
            raise BadInput("Please type or speak a question.")
        question = Message("user", DEFAULT_QUESTION, question.images)
    return [*earlier, question]


def rewrite_request(question: str, draft: str) -> Message:
    """The prompt that asks the base model to put a draft answer into better English."""
    return Message("user", REWRITE.format(question=question.strip() or DEFAULT_QUESTION, draft=draft.strip()))


def dialogue_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """Each question with the answers that followed it."""
    turns: list[list[Message]] = []
    for message in messages:
        if message.role == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return turns
