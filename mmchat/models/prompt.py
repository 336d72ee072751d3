"""Messages → token ids, for training and chat alike. No other module knows chat formats.

A conversation becomes a sequence of segments: control text of the format, what people wrote, and pictures. Each segment
is tokenized on its own, so the label mask is exact, and nothing a person types can open or close a turn: special tokens
count in control text only. Weights that bring a chat template are rendered with it instead (chat_template.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..conversation import ROLES, Message, has_images
from .chat_template import ChatTemplate, encode_rendered

if TYPE_CHECKING:
    from ..presets import Preset

IMAGE_TOKEN_ID = -200  # stands in the ids where a picture's features go, once for each feature


@dataclass(frozen=True)
class PictureLayout:
    """How weights were shown pictures in training, where that differs from the format of their language model.

    It is stored with the weights, which answer badly when prompted in another layout. A turn reads
    ``turn_start``, pictures, ``before_question``, question, ``after_question``, ``turn_end``, ``answer_start``, answer,
    ``answer_end``. The question and the text around it are one piece for the tokenizer; everything else is control
    text, in which special tokens count.
    """

    picture_first: bool = False  # pictures stand before everything else in their turn, even before ``system``
    system: str = ""  # opens the conversation, with its markers, unless the caller brings a system message
    turn_start: str = ""
    before_question: str = ""
    after_question: str = ""
    turn_end: str = ""
    answer_start: str = ""
    answer_end: str = ""  # written by the model, so it is trained
    added_tokens: tuple[str, ...] = ()  # words in the texts above that the tokenizer has to learn as one token each

    def __post_init__(self) -> None:
        object.__setattr__(self, "added_tokens", tuple(self.added_tokens))  # JSON has lists only
        texts = [value for name, value in vars(self).items() if name not in ("picture_first", "added_tokens")]
        if not all(isinstance(text, str) for text in (*texts, *self.added_tokens)):
            raise TypeError("The texts of a layout are strings.")
        if not isinstance(self.picture_first, bool):
            raise TypeError("picture_first is true or false.")


@dataclass(frozen=True)
class ChatFormat:
    """How one family of models marks turns."""

    turn_start: Mapping[str, str]  # role -> what opens its turns
    turn_end: Mapping[str, str]  # role -> what closes them; the assistant's is written by the model, so it is trained
    stops: tuple[str, ...]  # special tokens that end an answer
    between_turns: str = ""
    before_text: str = ""
    after_image: str = ""
    default_system: str | None = None  # said in text-only conversations that bring no system message
    picture_layout: PictureLayout | None = None  # of conversations with a picture, where the weights bring one
    template: ChatTemplate | None = None  # replaces everything above, where the weights bring one

    def answer_start(self, with_images: bool) -> str:
        """What opens an answer in a conversation with or without pictures."""
        if with_images and self.picture_layout:
            return self.picture_layout.answer_start
        return self.turn_start["assistant"]


def _for_roles(text: str) -> dict[str, str]:
    return {role: text.format(role=role) for role in ROLES}


CHAT_FORMATS = {
    "smollm2": ChatFormat(
        turn_start=_for_roles("<|im_start|>{role}\n"),
        turn_end=_for_roles("<|im_end|>"),
        stops=("<|im_end|>", "<|endoftext|>"),
        between_turns="\n",
        after_image="\n",
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    ),
    # The line breaks vanish: Phi-3's special tokens swallow the space that follows them.
    "phi-3": ChatFormat(
        turn_start=_for_roles("<|{role}|>\n"),
        turn_end=_for_roles("<|end|>\n"),
        stops=("<|end|>", "<|assistant|>", "<|endoftext|>"),
        after_image="\n",
    ),
    "phi-2": ChatFormat(
        turn_start={"system": "", "user": "Instruct:", "assistant": "Output:"},
        turn_end={"system": "", "user": "", "assistant": "<|endoftext|>"},
        stops=("<|endoftext|>",),
        between_turns="\n",
        before_text=" ",
    ),
}


def chat_format_of(preset: Preset) -> ChatFormat:
    """The chat format of a preset's language model, with the layout or the template that its weights bring."""
    if preset.chat_template:
        return ChatFormat(turn_start={}, turn_end={}, stops=(), template=preset.chat_template)
    return replace(CHAT_FORMATS[preset.language_model.chat_format], picture_layout=preset.picture_layout)


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation that is tokenized by itself; exactly one of ``text`` and ``image`` is set."""

    text: str = ""
    image: Any = None
    is_control: bool = False  # the format's own text, in which special tokens count
    is_answer: bool = False  # the model learns to write this


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation as the model reads it."""

    token_ids: list[int]
    is_answer: list[bool]  # as long as token_ids
    images: list[Any]  # in the order in which their IMAGE_TOKEN_IDs stand in token_ids


def no_text(image: Any) -> str:
    """What stands after a picture that nothing is said about."""
    return ""


def segments(
    messages: Sequence[Message], chat_format: ChatFormat, image_text: Callable[[Any], str] = no_text
) -> Iterator[Segment]:
    """The conversation piece by piece.

    Text-only conversations open with the format's default system message, which the base model was tuned on. Ones with
    a picture do not: the adapter was trained without, and every token counts on a small machine. Where the weights
    bring a layout, conversations with a picture follow it.
    """
    if chat_format.picture_layout and has_images(messages):
        yield from _laid_out(messages, chat_format, chat_format.picture_layout, image_text)
        return
    if chat_format.default_system and messages[0].role != "system" and not has_images(messages):
        messages = [Message("system", chat_format.default_system), *messages]
    for message in messages:
        is_answer = message.role == "assistant"
        yield Segment(chat_format.turn_start[message.role], is_control=True)
        for number, image in enumerate(message.images):
            yield Segment(chat_format.after_image if number else "", is_control=True)
            if len(message.images) > 1:  # so that a question can name one
                yield Segment(f"Picture {number + 1}:{chat_format.after_image}")
            yield Segment(image=image)
            if tags := image_text(image):
                yield Segment(chat_format.after_image + tags)
        # In one piece with what follows: so a tokenizer sees it, too, that reads a whole prompt at once.
        after_image = chat_format.after_image if message.images else ""
        yield Segment(after_image + chat_format.before_text + message.text, is_answer=is_answer)
        yield Segment(chat_format.turn_end[message.role], is_control=True, is_answer=is_answer)
        yield Segment(chat_format.between_turns, is_control=True)


def _laid_out(
    messages: Sequence[Message], chat_format: ChatFormat, layout: PictureLayout, image_text: Callable[[Any], str]
) -> Iterator[Segment]:
    """The segments of a conversation with a picture, in the layout of the weights."""
    system = layout.system if messages[0].role != "system" else ""
    for message in messages:
        if message.role == "system":
            yield Segment(chat_format.turn_start["system"], is_control=True)
            yield Segment(chat_format.before_text + message.text)
            yield Segment(chat_format.turn_end["system"] + chat_format.between_turns, is_control=True)
        elif message.role == "assistant":
            yield Segment(layout.answer_start, is_control=True)
            yield Segment(message.text, is_answer=True)
            yield Segment(layout.answer_end, is_control=True, is_answer=True)
        else:
            pictures = [part for image in message.images for part in (Segment(image=image), Segment(image_text(image)))]
            opening = [Segment(system + layout.turn_start, is_control=True)]
            yield from pictures + opening if layout.picture_first else opening + pictures
            yield Segment(layout.before_question + message.text + layout.after_question)
            yield Segment(layout.turn_end, is_control=True)
            system = ""


def encode(
    messages: Sequence[Message],
    tokenizer: Any,
    chat_format: ChatFormat,
    tokens_per_image: int,
    *,
    image_text: Callable[[Any], str] = no_text,
    add_generation_prompt: bool = False,
) -> EncodedConversation:
    """Tokenizes a conversation.

    Args:
        messages: at least one.
        tokenizer: a fast tokenizer of transformers.
        tokens_per_image: how many tokens the projector makes of one picture.
        image_text: what is said about a picture after it, such as its tags.
        add_generation_prompt: end with the start of an assistant turn, for the model to go on from.
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
    for piece in pieces:
        if piece.image is not None:
            piece_ids = [IMAGE_TOKEN_ID] * tokens_per_image
        else:
            piece_ids = tokenizer.encode(
                piece.text, add_special_tokens=False, split_special_tokens=not piece.is_control
            )
        token_ids += piece_ids
        is_answer += [piece.is_answer] * len(piece_ids)
    return EncodedConversation(token_ids, is_answer, [piece.image for piece in pieces if piece.image is not None])


def _encode_template(
    messages: Sequence[Message],
    tokenizer: Any,
    template: ChatTemplate,
    tokens_per_image: int,
    image_text: Callable[[Any], str],
    add_generation_prompt: bool,
) -> EncodedConversation:
    """Tokenizes a conversation with the weights' own chat template; what is said about pictures opens the text."""
    told = [
        replace(message, text="\n".join([*filter(None, map(image_text, message.images)), message.text]))
        for message in messages
    ]
    token_ids, is_answer = encode_rendered(
        template, told, tokenizer, tokens_per_image, IMAGE_TOKEN_ID, add_generation_prompt
    )
    return EncodedConversation(token_ids, is_answer, [image for message in messages for image in message.images])
