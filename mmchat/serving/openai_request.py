"""Reads a request of OpenAI's chat API: messages, pictures as data URLs, and sampling options."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..conversation import MAX_QUESTION, Message, SamplingOptions
from ..errors import BadInput
from ..media import open_image

MAX_BODY = 16 << 20  # bytes; four thirds of the pictures' size
MAX_MESSAGES, MAX_PICTURES, MAX_STOPS = 200, 8, 4
MAX_TEXT = 100_000  # characters in a conversation
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
UNSUPPORTED = ("tools", "functions", "logprobs", "audio")


@dataclass(frozen=True)
class ChatRequest:
    """A question from a program."""

    messages: list[Message]
    options: SamplingOptions
    stops: tuple[str, ...]
    stream: bool
    with_usage: bool  # a last event of the stream counts the tokens
    model: str | None


def read_request(body: Any) -> ChatRequest:
    """Checks and converts the JSON of a request.

    Raises:
        BadInput: something is missing, wrong or not supported; the message says what.
    """
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise BadInput('The request needs a list of "messages".')
    if unsupported := next((name for name in UNSUPPORTED if body.get(name)), None):
        raise BadInput(f'"{unsupported}" is not supported here.')
    if body.get("n") not in (None, 1):
        raise BadInput("One answer is given at a time: n must be 1.")
    if len(body["messages"]) > MAX_MESSAGES:
        raise BadInput(f"A conversation may have at most {MAX_MESSAGES} messages.")
    messages = [_message(entry) for entry in body["messages"]]
    if sum(len(message.images) for message in messages) > MAX_PICTURES:
        raise BadInput(f"A conversation may show at most {MAX_PICTURES} pictures.")
    if len(messages[-1].text) > MAX_QUESTION:
        raise BadInput(f"Please ask in at most {MAX_QUESTION} characters.")
    if sum(len(message.text) for message in messages) > MAX_TEXT:
        raise BadInput(f"A conversation may have at most {MAX_TEXT} characters.")
    stream_options = body.get("stream_options")
    return ChatRequest(
        messages,
        _options(body),
        _stops(body.get("stop")),
        body.get("stream") is True,
        isinstance(stream_options, dict) and stream_options.get("include_usage") is True,
        body["model"] if isinstance(body.get("model"), str) else None,
    )


def _options(body: dict[str, Any]) -> SamplingOptions:
    kinds = {"temperature": (int, float), "top_p": (int, float), "seed": int, "max_new_tokens": int}
    limit = body.get("max_completion_tokens")
    given = {**body, "max_new_tokens": body.get("max_tokens") if limit is None else limit}
    given = {name: given[name] for name in kinds if given.get(name) is not None}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, kinds[name]):  # type: ignore[arg-type]
            raise BadInput(f'"{"max_tokens" if name == "max_new_tokens" else name}" must be a number.')
    if not -(2**63) <= given.get("seed", 0) < 2**63:
        raise BadInput("The seed must be a whole number of at most 64 bits.")
    return SamplingOptions(**given)


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise BadInput(f'"stop" must be a text or a list of at most {MAX_STOPS} texts.')
    return tuple(stops)


def _message(entry: Any) -> Message:
    if not isinstance(entry, dict) or entry.get("role") not in ROLES:
        raise BadInput(f"The role of a message must be one of {', '.join(ROLES)}.")
    content = entry.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise BadInput("The content of a message must be a text or a list of parts.")
    texts, pictures = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and entry["role"] == "user":
            pictures.append(_picture(part.get("image_url")))
        else:
            raise BadInput("A part of a message must be a text, or a picture of the user's as an image_url.")
    return Message(ROLES[entry["role"]], "\n".join(texts), pictures)


def _picture(image_url: Any) -> Any:
    """Decodes a data URL; no other address is ever fetched."""
    url = image_url.get("url") if isinstance(image_url, dict) else image_url
    if not isinstance(url, str) or not url.startswith("data:image/") or ";base64," not in url[:100]:
        raise BadInput("A picture must be a data URL in base64; this server fetches no addresses.")
    try:
        data = base64.b64decode(url.split(",", 1)[1], validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadInput("A picture's data URL is not valid base64.") from error
    return open_image(io.BytesIO(data))


def until(pieces: Iterator[str], stops: tuple[str, ...]) -> Iterator[str]:
    """The text up to the first stop text; what may be the beginning of one is held until that is known."""
    held = ""
    for piece in pieces:
        held += piece
        found = [at for at in map(held.find, stops) if at >= 0]
        if found:
            if text := held[: min(found)]:
                yield text
            return
        length = max((_overlap(held, stop) for stop in stops), default=0)
        text, held = held[: len(held) - length], held[len(held) - length :]
        if text:
            yield text
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text may begin the stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
