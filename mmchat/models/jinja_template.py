"""Renders the Jinja chat template in a model's files, as transformers does. The built-in formats: chat_formats.py.

During rendering, placeholders stand for what people wrote, so we know which characters are theirs: these can neither
open a turn nor stand for an image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversation import Message
from ..errors import WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"
KNOWN_STOPS = ("<|end|>", "<|im_end|>", "<|eot_id|>", "</s>", "<|endoftext|>", "<|assistant|>")
PLACEHOLDER = re.compile("( ?)\ue000(\\d+)\ue001( ?)")


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the token that stands for an image in it."""

    text: str  # Jinja
    image_token: str = IMAGE_TOKEN


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation."""

    text: str
    message_index: int | None = None  # of the message that wrote it; None: the template's own text


def read_template(folder: Path, name: str) -> str:
    """The chat template in a model's files: the processor's, else the tokenizer's.

    Raises:
        WeightsError: there is none.
    """
    for file in ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = folder / file
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jinja":
            return text
        try:
            found = json.loads(text).get("chat_template")
        except (ValueError, AttributeError) as error:
            raise WeightsError(f"{file} of '{name}' is damaged. Fetch it again.") from error
        if isinstance(found, list):  # several by name
            found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
        if found:
            return str(found)
    raise WeightsError(f"'{name}' has no chat template, so I cannot tell which prompts it was trained with.")


def render(
    template: ChatTemplate,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerFast,
    add_generation_prompt: bool = False,
) -> list[Piece]:
    """Renders a conversation. Each image is one ``image_token`` in the template's own text.

    Raises:
        WeightsError: the template cannot be rendered.
    """
    from jinja2 import TemplateError

    failure: Exception | None = None
    for has_parts in (True, False):
        for merges_system in (False, True):
            contents = _contents(messages, has_parts, template.image_token)
            if merges_system:
                contents = _without_system(contents, has_parts)
            try:
                text = tokenizer.apply_chat_template(
                    contents,
                    chat_template=template.text,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            except (TemplateError, TypeError, ValueError) as error:
                failure = error
                continue
            pieces = _split(text, messages)
            images = sum(piece.text.count(template.image_token) for piece in pieces if piece.message_index is None)
            indices = [piece.message_index for piece in pieces if piece.message_index is not None]
            if images == sum(len(message.images) for message in messages) and indices == list(range(len(messages))):
                return pieces
    raise WeightsError("The chat template of these weights does not show every message and picture.") from failure


def _contents(messages: Sequence[Message], has_parts: bool, image_token: str) -> list[dict[str, Any]]:
    """The messages as transformers takes them, with placeholders for their texts.

    Args:
        has_parts: give lists of images and texts, as a processor's template takes them, in place of one string.
    """
    contents: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        text = f" \ue000{index}\ue001 "  # the spaces show whether the template strips a text
        if has_parts:
            parts = [{"type": "image"} for _ in message.images] + [{"type": "text", "text": text}]
            contents.append({"role": message.role, "content": parts})
        else:
            contents.append({"role": message.role, "content": f"{image_token}\n" * len(message.images) + text})
    return contents


def _without_system(contents: list[dict[str, Any]], has_parts: bool) -> list[dict[str, Any]]:
    """The same with the system message merged into the first question, for templates without a system role."""
    if len(contents) < 2 or contents[0]["role"] != "system":
        return contents
    system, first, *others = contents
    separator: Any = [{"type": "text", "text": "\n"}] if has_parts else "\n"
    return [{"role": first["role"], "content": system["content"] + separator + first["content"]}, *others]


def _split(text: str, messages: Sequence[Message]) -> list[Piece]:
    pieces, start = [], 0
    for found in PLACEHOLDER.finditer(text):
        pieces.append(Piece(text[start : found.start()]))
        index = int(found[2])
        written = messages[index].text
        written = written if found[1] else written.lstrip()
        written = written if found[3] else written.rstrip()
        pieces.append(Piece(written, index))
        start = found.end()
    return [*pieces, Piece(text[start:])]


def escape_special_tokens(text: str, special: Iterable[str]) -> str:
    """Puts a space into every special token in a text, so that it is tokenized as plain text."""
    tokens = [token for token in special if len(token) > 1]
    while found := next((token for token in tokens if token in text), None):
        text = text.replace(found, f"{found[0]} {found[1:]}")
    return text


def tokenize_rendered(
    template: ChatTemplate,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerFast,
    tokens_per_image: int,
    image_token_id: int,
    add_generation_prompt: bool,
) -> tuple[list[int], list[bool]]:
    """Token ids as transformers' processor gives them, and which of them are answers.

    The conversation is tokenized as a whole, because many tokenizers merge characters across segment boundaries.

    Args:
        image_token_id: the placeholder of an image token; each image has ``tokens_per_image`` of them.
    """
    text, answers = "", []
    pieces = render(template, messages, tokenizer, add_generation_prompt)
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        if piece.message_index is None:
            text += piece.text.replace(template.image_token, template.image_token * tokens_per_image)
            continue
        start = len(text)
        text += escape_special_tokens(piece.text, [*special, template.image_token])
        if messages[piece.message_index].role == "assistant":
            end = _answer_end(following.text if following else "", tokenizer)
            answers.append((start, len(text) + end))
            is_last = piece.message_index == len(messages) - 1 and not add_generation_prompt
            if is_last and not end and tokenizer.eos_token:  # else the model would never learn to stop
                text += tokenizer.eos_token
                answers[-1] = (start, len(text))
                break
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    encoded = tokenizer(text, add_special_tokens=not has_bos, return_offsets_mapping=True)
    template_id = tokenizer.convert_tokens_to_ids(template.image_token)
    token_ids = [image_token_id if token == template_id else token for token in encoded["input_ids"]]
    is_answer = [
        start < end and any(start < last and first < end for first, last in answers)
        for start, end in encoded["offset_mapping"]
    ]
    return token_ids, is_answer


def _answer_end(following: str, tokenizer: PreTrainedTokenizerFast) -> int:
    """Number of characters after an answer's text that belong to it: those up to its stop token; 0 without one."""
    stripped = following.lstrip()
    for stop in (tokenizer.eos_token, *KNOWN_STOPS):
        if stop and stripped.startswith(stop):
            return len(following) - len(stripped) + len(stop)
    return 0


def stop_ids(template: ChatTemplate, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids that end an answer: the tokenizer's EOS, and every token of KNOWN_STOPS that the template contains."""
    tokens = {tokenizer.eos_token, *(stop for stop in KNOWN_STOPS if stop in template.text)} - {None}
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary[token] for token in tokens if token in vocabulary)
