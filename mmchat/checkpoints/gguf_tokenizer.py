"""A model's tokenizer and chat template in GGUF."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import BadInput
from ..models.chat_formats import ChatFormat
from .llava_export import chat_template


def gguf_template(chat_format: ChatFormat, tokenizer: Any) -> str:
    """The chat template. llama.cpp puts a marker, <__media_…__>, for each picture into the message's text."""
    said = "message['content'] }}"
    template = chat_template(_without_swallowed(chat_format, tokenizer))
    return template.replace(said, f"message['content'] | replace('__>', {'__>' + chat_format.after_image!r}) }}}}", 1)


def _without_swallowed(chat_format: ChatFormat, tokenizer: Any) -> ChatFormat:
    """The format without the space that Phi-3's special tokens swallow: llama.cpp would read it."""
    swallowing = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.rstrip]
    if not swallowing:
        return chat_format
    pattern = re.compile(f"({'|'.join(map(re.escape, swallowing))})\\s+")

    def without(texts: Mapping[str, str]) -> dict[str, str]:
        return {role: pattern.sub(r"\1", text) for role, text in texts.items()}

    return replace(chat_format, turn_start=without(chat_format.turn_start), turn_end=without(chat_format.turn_end))


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
    special.add_special_token = {"bos": False, "eos": False}  # the chat template says all that is to be said
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
