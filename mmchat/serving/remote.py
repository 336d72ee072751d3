"""An engine on a model server: any that speaks OpenAI's chat API with pictures, such as vLLM."""

from __future__ import annotations

import base64
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ..conversation import Message, SamplingOptions, rewrite_request, with_question
from ..errors import BadInput, MmchatError
from ..media import decode_image
from ..models.speech_mixin import SpeechMixin
from ..models.speech_recognition import SpeechRecognizer
from ..models.text_to_speech import Voice
from ..presets import SMOL, SpeechPreset

logger = logging.getLogger(__name__)

MAX_SIDE = 1024  # pixels; pictures are scaled down before sending, since models see less


class RemoteEngine(SpeechMixin):
    """Answers through a model server. Speech recognition and the voice run locally.

    Args:
        address: base URL of the server's API, such as http://localhost:8000/v1.
        model: name of the model on the server; the first one listed if None.
        key: API key; OPENAI_API_KEY if None.
        speech: the Whisper model.

    Raises:
        MmchatError: the openai package is missing, the server cannot be reached, or it has no model.
    """

    def __init__(
        self, address: str, model: str | None = None, key: str | None = None, speech: SpeechPreset = SMOL.speech
    ):
        try:
            import openai
        except ImportError as error:
            raise MmchatError("A model server needs one more package: pip install openai") from error
        key = key or os.environ.get("OPENAI_API_KEY") or "none"
        self.client = openai.OpenAI(base_url=address, api_key=key, max_retries=1, timeout=120)
        self.speech_recognizer = SpeechRecognizer(speech)
        self.voice = Voice()
        self.answers_in: tuple[str, ...] = ()  # the server does not say
        if not model:
            with _explained_errors():
                model = next((found.id for found in self.client.models.list()), None)
            if not model:
                raise MmchatError("The model server lists no model. Name one with MMCHAT_MODEL.")
        self.model = model

    @property
    def about(self) -> str:
        """Which model answers."""
        return f"Answers come from {Path(self.model).name} on a model server."

    def warm_up(self) -> None:
        """Fetches the speech model."""
        self.speech_recognizer.fetch()

    def reply(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> Iterator[str]:
        """Streams the answer to a conversation from the server. Closing the iterator ends the request.

        Args:
            messages, options: see ``Engine.reply``; beams, repetition_penalty and no_repeat_ngram_size are not sent.
            notify: never called, because a server does not report dropped turns.

        Raises:
            BadInput: there is no question, or a picture cannot be read.
            MmchatError: the server failed; the message says how.
        """
        options = options or SamplingOptions()
        settings = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}
        sent = [_to_openai(message) for message in with_question(messages)]
        with _explained_errors():
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
        """Streams a draft answer in better English, see ``Engine.rewrite``; the same served model writes it."""
        return self.reply([rewrite_request(question, draft)], options)


def _to_openai(message: Message) -> dict[str, Any]:
    """A message in OpenAI's format, with pictures as data URLs."""
    if not message.images:
        return {"role": message.role, "content": message.text}
    pictures = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in message.images]
    return {"role": message.role, "content": [*pictures, {"type": "text", "text": message.text}]}


def _data_url(source: Any) -> str:
    image = decode_image(source)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    data = io.BytesIO()
    kind = "png" if max(image.size) <= 64 else "jpeg"
    image.save(data, kind, quality=95)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


@contextmanager
def _explained_errors() -> Iterator[None]:
    """Turns errors of the openai package into sentences."""
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
        return MmchatError("The model server rejected the API key. Set OPENAI_API_KEY.")
    if isinstance(error, openai.RateLimitError):
        return MmchatError("The model server is busy. Please try again in a moment.")
    if isinstance(error, openai.NotFoundError):
        return MmchatError("The model server does not have that model. Name another with MMCHAT_MODEL.")
    if isinstance(error, (openai.BadRequestError, openai.UnprocessableEntityError)):
        return BadInput(
            "The model server rejected the request. The conversation may be too long for it; please start a new one."
        )
    return MmchatError("The model server failed. Please try again.")
