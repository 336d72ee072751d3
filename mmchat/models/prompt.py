"""Messages → token ids. Training and chat build prompts here only.

A conversation becomes a sequence of segments: control text of the chat format, what people wrote, and images. Each
segment is tokenized on its own, so the label mask is exact, and nothing a person types can open or close a turn:
special tokens are recognized only in control text. If the weights include a Jinja template, jinja_template.py renders
that instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..conversation import ImageSource, Message, has_images
from .chat_formats import ChatFormat, PromptTemplate
from .jinja_template import ChatTemplate, tokenize_rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IMAGE_TOKEN_ID = -200  # a placeholder in the token ids, one for each image token


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation that is tokenized by itself. At most one of ``text`` and ``image`` is set."""

    text: str = ""
    image: ImageSource | None = None
    is_control: bool = False  # the format's own text; special tokens are recognized only here
    is_answer: bool = False  # the model learns to generate it
    is_image_text: bool = False  # of the image before it


@dataclass(frozen=True)
class TokenizedConversation:
    """A conversation as the model reads it."""

    token_ids: list[int]
    is_answer: list[bool]  # as long as token_ids
    images: list[ImageSource]  # in the order of their IMAGE_TOKEN_IDs
    image_ends: tuple[int, ...] = ()  # the index after each image and its text, where they are tokenized by themselves


def no_text(image: ImageSource) -> str:
    """The default ``image_text``: adds no text after an image."""
    return ""


def segments(
    messages: Sequence[Message], chat_format: ChatFormat, image_text: Callable[[ImageSource], str] = no_text
) -> Iterator[Segment]:
    """The segments of a conversation, in order.

    Text-only conversations open with the format's default system message, which the base model was tuned on.
    Conversations with an image have none: the adapter was trained without it, and every token costs time on a small
    machine. If the weights have a prompt template, conversations with an image follow it.
    """
    if chat_format.prompt_template and has_images(messages):
        yield from _template_segments(messages, chat_format, chat_format.prompt_template, image_text)
        return
    if chat_format.default_system and messages[0].role != "system" and not has_images(messages):
        messages = [Message("system", chat_format.default_system), *messages]
    for message in messages:
        is_answer = message.role == "assistant"
        yield Segment(chat_format.turn_start[message.role], is_control=True)
        for index, image in enumerate(message.images):
            yield Segment(chat_format.after_image if index else "", is_control=True)
            if len(message.images) > 1:  # so that a question can name one
                yield Segment(f"Picture {index + 1}:{chat_format.after_image}")
            yield Segment(image=image)
            if tags := image_text(image):
                yield Segment(chat_format.after_image + tags, is_image_text=True)
        # Joined with the text so that the tokens equal those of a tokenizer that is given the whole prompt at once.
        after_image = chat_format.after_image if message.images else ""
        yield Segment(after_image + chat_format.before_text + message.text, is_answer=is_answer)
        yield Segment(chat_format.turn_end[message.role], is_control=True, is_answer=is_answer)
        yield Segment(chat_format.between_turns, is_control=True)


def _template_segments(
    messages: Sequence[Message],
    chat_format: ChatFormat,
    template: PromptTemplate,
    image_text: Callable[[ImageSource], str],
) -> Iterator[Segment]:
    """The segments of a conversation with an image, in the prompt template of the weights."""
    system = template.system if messages[0].role != "system" else ""
    for message in messages:
        if message.role == "system":
            yield Segment(chat_format.turn_start["system"], is_control=True)
            yield Segment(chat_format.before_text + message.text)
            yield Segment(chat_format.turn_end["system"] + chat_format.between_turns, is_control=True)
        elif message.role == "assistant":
            yield Segment(template.answer_start, is_control=True)
            yield Segment(message.text, is_answer=True)
            yield Segment(template.answer_end, is_control=True, is_answer=True)
        else:
            images = [
                part
                for image in message.images
                for part in (Segment(image=image), Segment(image_text(image), is_image_text=True))
            ]
            opening = [Segment(system + template.turn_start, is_control=True)]
            yield from images + opening if template.picture_first else opening + images
            yield Segment(template.before_question + message.text + template.after_question)
            yield Segment(template.turn_end, is_control=True)
            system = ""


def tokenize_conversation(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerFast,
    chat_format: ChatFormat,
    tokens_per_image: int,
    *,
    image_text: Callable[[ImageSource], str] = no_text,
    add_generation_prompt: bool = False,
) -> TokenizedConversation:
    """Tokenizes a conversation.

    Args:
        messages: at least one.
        tokens_per_image: number of tokens that the projector makes of one image.
        image_text: gives the text that is added after an image, such as its tags.
        add_generation_prompt: end with the start of an assistant turn, which the model continues.
    """
    if chat_format.template:
        return _encode_template(
            messages, tokenizer, chat_format.template, tokens_per_image, image_text, add_generation_prompt
        )
    pieces = list(segments(messages, chat_format, image_text))
    if add_generation_prompt:
        pieces.append(Segment(chat_format.answer_start(has_images(messages)), is_control=True))
    token_ids: list[int] = []
    is_answer: list[bool] = []
    image_ends: list[int] = []
    for piece in pieces:
        if piece.image is not None:
            piece_ids = [IMAGE_TOKEN_ID] * tokens_per_image
        else:
            piece_ids = tokenizer.encode(
                piece.text, add_special_tokens=False, split_special_tokens=not piece.is_control
            )
        token_ids += piece_ids
        is_answer += [piece.is_answer] * len(piece_ids)
        if piece.is_image_text:
            image_ends.pop()
        if piece.is_image_text or piece.image is not None:
            image_ends.append(len(token_ids))
    images = [piece.image for piece in pieces if piece.image is not None]
    return TokenizedConversation(token_ids, is_answer, images, tuple(image_ends))


def _encode_template(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    tokens_per_image: int,
    image_text: Callable[[ImageSource], str],
    add_generation_prompt: bool,
) -> TokenizedConversation:
    """Tokenizes a conversation with the Jinja template of the weights. The text about an image opens its message."""
    with_tags = [
        replace(message, text="\n".join([*filter(None, map(image_text, message.images)), message.text]))
        for message in messages
    ]
    token_ids, is_answer = tokenize_rendered(
        template, with_tags, tokenizer, tokens_per_image, IMAGE_TOKEN_ID, add_generation_prompt
    )
    return TokenizedConversation(token_ids, is_answer, [image for message in messages for image in message.images])
