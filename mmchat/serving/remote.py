"""An engine elsewhere: any server that speaks OpenAI's chat API and reads pictures, as vLLM does."""

from __future__ import annotations

import base64
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ..conversation import Message, SamplingOptions, Transcript, rewrite_request, with_question
from ..errors import BadInput, MmchatError
from ..media import decode_image
from ..models.speech import SpeechRecognizer
from ..presets import SMOL

logger = logging.getLogger(__name__)

LONGEST_SIDE = 1024  # pixels of a picture that is sent; models of this kind see less


class RemoteEngine:
    """Holds conversations by way of a server; speech is still understood here.

    Args:
        address: of the server's API, as http://localhost:8000/v1.
        model: its name there; the server's first if None.
        key: what the server asks for; OPENAI_API_KEY if None.

    Raises:
        MmchatError: the openai package is missing, or the server cannot be reached.
    """

    def __init__(self, address: str, model: str | None = None, key: str | None = None):
        try:
            import openai
        except ImportError as error:
            raise MmchatError("A model server needs one more package: pip install openai") from error
        key = key or os.environ.get("OPENAI_API_KEY") or "none"
        self.client = openai.OpenAI(base_url=address, api_key=key, max_retries=1, timeout=120)
        self.speech_recognizer = SpeechRecognizer(SMOL.speech)
        if not model:
            with _said_in_words():
                model = next((found.id for found in self.client.models.list()), None)
            if not model:
                raise MmchatError("The model server offers no model. Name one with MMCHAT_MODEL.")
        self.model = model

    @property
    def about(self) -> str:
        """What answers here."""
        return f"Answers come from {Path(self.model).name} on a model server."

    def warm_up(self) -> None:
        """Loads the speech model."""
        self.speech_recognizer.load()

    def transcribe(self, path: str | Path) -> Transcript:
        """What is said in a recording, as ``Engine.transcribe`` tells it."""
        return self.speech_recognizer.transcribe(path)

    def reply(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> Iterator[str]:
        """The answer to a conversation, in pieces as the server writes them. Closing the iterator ends the request.

        Args:
            messages, options: as ``Engine.reply`` takes them; beams are up to the server.
            notify: not called: a server says nothing of turns it leaves out.

        Raises:
            BadInput: there is no question, or a picture cannot be read.
            MmchatError: the server failed; the sentence says how.
        """
        options = options or SamplingOptions()
        settings = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}
        sent = [_as_sent(message) for message in with_question(messages)]
        with _said_in_words():
            stream = self.client.chat.completions.create(
                model=self.model,
                messages=sent,
                stream=True,
                max_tokens=options.max_new_tokens,
                **{name: value for name, value in settings.items() if value is not None},
            )
            with closing(stream):
                for event in stream:
                    piece = event.choices[0].delta.content if event.choices else None
                    if piece:
                        yield piece

    def rewrite(self, question: str, draft: str, options: SamplingOptions | None = None) -> Iterator[str]:
        """A draft answer in better English, as ``Engine.rewrite`` gives it; here its adapter is part of the model."""
        return self.reply([rewrite_request(question, draft)], options)


def _as_sent(message: Message) -> dict[str, Any]:
    """A message in OpenAI's form, its pictures as data URLs."""
    if not message.images:
        return {"role": message.role, "content": message.text}
    pictures = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in message.images]
    return {"role": message.role, "content": [*pictures, {"type": "text", "text": message.text}]}


def _data_url(source: Any) -> str:
    image = decode_image(source)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    data = io.BytesIO()
    image.save(data, "PNG" if max(image.size) <= 64 else "JPEG", quality=95)
    return (
        f"data:image/{'png' if max(image.size) <= 64 else 'jpeg'};base64,{base64.b64encode(data.getvalue()).decode()}"
    )


@contextmanager
def _said_in_words() -> Iterator[None]:
    """Turns the openai package's errors into sentences."""
    import openai

    try:
        yield
    except openai.OpenAIError as error:
        logger.debug("model server", exc_info=error)
        raise _sentence(error) from error


def _sentence(error: Exception) -> MmchatError:
    import openai

    if isinstance(error, openai.APITimeoutError):
        return MmchatError("The model server did not answer in time. Please try again.")
    if isinstance(error, openai.APIConnectionError):
        return MmchatError("The model server cannot be reached. Please try again later.")
    if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
        return MmchatError("The model server wants another key: set OPENAI_API_KEY.")
    if isinstance(error, openai.RateLimitError):
        return MmchatError("The model server is busy. Please try again in a moment.")
    if isinstance(error, openai.NotFoundError):
        return MmchatError("The model server does not have that model. Name another with MMCHAT_MODEL.")
    if isinstance(error, (openai.BadRequestError, openai.UnprocessableEntityError)):
        return BadInput("The model server could not read that; perhaps the conversation is too long for it.")
    return MmchatError("The model server failed. Please try again.")
