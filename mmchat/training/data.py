"""Training data: conversations in LLaVA-Instruct JSON, picture features on disk, batches.

The JSON is LLaVA's own (Liu et al. 2023, arXiv 2304.08485): a list of
``{"id", "image", "conversations": [{"from": "human" | "gpt", "value": text}, …]}`` with ``<image>`` in the human text
where the picture is shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..errors import BadInput
from ..model import IGNORED
from ..prompt import ChatFormat, Message, encode

IMAGE_MARK = "<image>"
SPEAKERS = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """One training example: messages whose pictures are file names."""

    id: str
    messages: tuple[Message, ...]


def read_conversations(path: str | Path) -> list[Conversation]:
    """Reads LLaVA-Instruct JSON.

    Raises:
        BadInput: it is no such file; the message names the entry.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path.name} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise BadInput(f"{path.name} cannot be read as JSON: {error}.") from error
    if not isinstance(entries, list):
        raise BadInput(f"{path.name} is not a list of conversations.")
    return [_conversation(entry, f"{path.name}, entry {number}") for number, entry in enumerate(entries)]


def _conversation(entry: Any, place: str) -> Conversation:
    try:
        image, turns = entry.get("image"), entry["conversations"]
        messages = []
        for turn in turns:
            text = turn["value"]
            shows = IMAGE_MARK in text and turn["from"] == "human"
            text = text.replace(IMAGE_MARK, "").strip() if shows else text.strip()
            messages.append(Message(SPEAKERS[turn["from"]], text, [image] if shows else []))
    except (AttributeError, KeyError, TypeError) as error:
        raise BadInput(f"{place} is not a LLaVA-Instruct conversation ({error!r}).") from error
    if not any(message.role == "assistant" for message in messages):
        raise BadInput(f"{place} has no answer to learn from.")
    return Conversation(str(entry.get("id", place)), tuple(messages))


class FeatureStore:
    """Features of a folder of pictures, computed once: ``features.npy`` [pictures, features, width] in half precision
    and ``index.json`` with the encoder's name and the file names, row by row."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        index = json.loads((folder / "index.json").read_text())
        self.encoder: str = index["encoder"]
        self.rows = {name: row for row, name in enumerate(index["images"])}
        self.features = np.load(folder / "features.npy", mmap_mode="r")

    @staticmethod
    def write(folder: str | Path, encoder: str, names: Sequence[str], batches: Iterable[np.ndarray]) -> None:
        """Writes the store; ``batches`` are arrays [n, features, width] in the order of ``names``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        features, row = None, 0
        for batch in batches:
            if features is None:
                shape = (len(names), *batch.shape[1:])
                features = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, shape)
            features[row : row + len(batch)] = batch
            row += len(batch)
        if features is not None:
            features.flush()
        (folder / "index.json").write_text(json.dumps({"encoder": encoder, "images": list(names)}))

    def __getitem__(self, name: str) -> torch.Tensor:
        """[features, width] of one picture."""
        return torch.from_numpy(self.features[self.rows[name]].copy())


class ConversationDataset(Dataset):
    """Tokenised conversations with the features of their pictures.

    Raises:
        BadInput: a picture has no features.
    """

    def __init__(
        self, conversations: Sequence[Conversation], store: FeatureStore, tokenizer: Any, chat_format: ChatFormat
    ):
        self.store = store
        for conversation in conversations:
            for message in conversation.messages:
                for name in message.images:
                    if name not in store.rows:
                        raise BadInput(f"Conversation {conversation.id} shows '{name}', which has no features.")
        tokens_per_image = store.features.shape[1]
        self.encoded = [
            encode(conversation.messages, tokenizer, chat_format, tokens_per_image) for conversation in conversations
        ]

    def __len__(self) -> int:
        return len(self.encoded)

    def length(self, index: int) -> int:
        """In tokens."""
        return len(self.encoded[index].token_ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        encoded = self.encoded[index]
        token_ids = torch.tensor(encoded.token_ids)  # [length]
        labels = token_ids.where(torch.tensor(encoded.is_answer), IGNORED)
        features = [self.store[name] for name in encoded.images]
        return {"input_ids": token_ids, "labels": labels, "features": torch.stack(features) if features else None}


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pads on the right and joins the pictures in reading order."""

    def pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    features = [example["features"] for example in examples if example["features"] is not None]
    return {
        "input_ids": pad([example["input_ids"] for example in examples], 0),
        "attention_mask": pad([torch.ones_like(example["input_ids"]) for example in examples], 0),
        "labels": pad([example["labels"] for example in examples], IGNORED),
        "image_features": torch.cat(features).float() if features else None,
    }
