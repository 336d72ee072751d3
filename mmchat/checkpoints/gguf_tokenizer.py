"""A model's tokenizer and chat template in GGUF."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..conversation import Message
from ..errors import BadInput
from ..models.chat_formats import ChatFormat
from ..models.jinja_template import ChatTemplate, render
from .llava_export import chat_template


def gguf_template(chat_format: ChatFormat, tokenizer: Any) -> str:
    """The chat template. llama.cpp puts a marker, <__media_…__>, for each picture into the message's text.

    Raises:
        BadInput: it is a LLaVA model's, and lays out turns in a way that cannot be written for llama.cpp.
    """
    if chat_format.template:
        return _llava_template(chat_format.template, tokenizer)
    said = "message['content'] }}"
    turns = {
        name: {role: _without_swallowed(text, tokenizer) for role, text in getattr(chat_format, name).items()}
        for name in ("turn_start", "turn_end")
    }
    template = chat_template(replace(chat_format, **turns))
    return template.replace(said, f"{_marked(chat_format.after_image)} }}}}", 1)


def _llava_template(template: ChatTemplate, tokenizer: Any) -> str:
    """A LLaVA model's chat template in the texts that it writes before, between and behind the messages."""

    def texts(*messages: Message) -> list[str]:
        pieces = render(template, messages, tokenizer, add_generation_prompt=True)
        return [piece.text for piece in pieces if piece.message_index is None]

    question, answer, seen = Message("user", "a"), Message("assistant", "b"), Message("user", "a", ["picture"])
    first, before_answer, after_answer, last = texts(question, answer, question)
    image = texts(seen)[0].removeprefix(first)
    expected = [first + image, before_answer, after_answer + image, before_answer, after_answer, last]
    if not image.startswith(template.image_token) or texts(seen, answer, seen, answer, question) != expected:
        raise BadInput(
            "The chat template of these weights does more than put fixed texts around messages, so it cannot be "
            "written for llama.cpp. export_llava.py exports them for transformers and vLLM."
        )
    before_system, after_system, *_ = texts(Message("system", "s"), question)
    if not (tokenizer.bos_token and first.startswith(tokenizer.bos_token)):
        bos = "".join(tokenizer.convert_ids_to_tokens(tokenizer("").input_ids))
        first, before_system = bos + first, bos + before_system
    written = (first, before_answer, after_answer, last, before_system, after_system, image)
    first, before_answer, after_answer, last, before_system, after_system, image = (
        _without_swallowed(text, tokenizer) for text in written
    )
    return (
        "{% for message in messages %}{% set r = message['role'] %}"
        f"{{% if r == 'assistant' %}}{{{{ {before_answer!r} }}}}"
        f"{{% elif r == 'system' %}}{{{{ {before_system!r} }}}}{{% elif loop.first %}}{{{{ {first!r} }}}}{{% endif %}}"
        f"{{{{ {_marked(image.removeprefix(template.image_token))} }}}}"
        f"{{% if r == 'system' %}}{{{{ {after_system!r} }}}}"
        f"{{% elif r == 'assistant' and not loop.last %}}{{{{ {after_answer!r} }}}}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {last!r} }}}}{{% endif %}}"
    )


def _marked(after_image: str) -> str:
    """The Jinja expression for a message's text, with ``after_image`` behind each picture's marker."""
    return f"message['content'] | replace('__>', {'__>' + after_image!r})"


def _without_swallowed(text: str, tokenizer: Any) -> str:
    """A text without the space that Phi-3's special tokens swallow: llama.cpp would read it."""
    swallowing = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.rstrip]
    pattern = "|".join(map(re.escape, swallowing))
    return re.sub(f"({pattern})\\s+", r"\1", text) if swallowing else text


def add_tokenizer(writer: Any, tokenizer: Any, rows: int) -> None:
    """Writes the vocabulary as llama.cpp reads it: byte-level BPE as GPT-2's, or SentencePiece's BPE as Phi-3's.

    Args:
        rows: of the embedding, which may have more than there are tokens.

    Raises:
        BadInput: llama.cpp has no name for how the tokenizer splits text.
    """
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        described = json.loads((Path(folder) / "tokenizer.json").read_text())
        special = gguf.SpecialVocab(folder, load_merges=not described["model"].get("byte_fallback"))
    writer.add_tokenizer_model("llama" if described["model"].get("byte_fallback") else "gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(described))
    added = {token["id"]: token for token in described["added_tokens"]}
    by_id = {index: text for text, index in tokenizer.get_vocab().items()}
    texts, types = [], []
    for index in range(rows):
        text = by_id.get(index, f"[PAD{index}]")
        texts.append(text)
        types.append(_token_type(text, index in by_id, added.get(index), tokenizer.unk_token))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    if described["model"].get("byte_fallback"):
        writer.add_token_scores([-float(index) for index in range(rows)])  # merges stand in the order of the vocabulary
        writer.add_add_space_prefix(True)
    special.add_special_token = {"bos": False, "eos": False}  # the chat template writes these tokens
    special.chat_template = None
    special.add_to_gguf(writer, quiet=True)


def _pre_tokenizer(described: dict[str, Any]) -> str:
    """llama.cpp's name of how text is split before BPE."""
    if described["model"].get("byte_fallback"):
        return "default"
    splitter = described.get("pre_tokenizer") or {}
    parts = [part["type"] for part in splitter.get("pretokenizers", [splitter])]
    known = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}
    if tuple(parts) not in known:
        raise BadInput("The tokenizer splits text in a way that this export has no name for in llama.cpp.")
    return known[tuple(parts)]


def _token_type(text: str, is_known: bool, added: dict[str, Any] | None, unknown: str | None) -> int:
    import gguf

    if not is_known:
        return int(gguf.TokenType.UNUSED)
    if text == unknown:
        return int(gguf.TokenType.UNKNOWN)
    if added:
        return int(gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED)
    return int(gguf.TokenType.BYTE if len(text) == 6 and text.startswith("<0x") else gguf.TokenType.NORMAL)
