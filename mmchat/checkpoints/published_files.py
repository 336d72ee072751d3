"""The files of a published checkpoint, and the report of what an import took from them."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import WeightsError, counted


@dataclass
class ImportReport:
    """What happened to each tensor (their name -> ours, or why it was ignored), and what was assumed."""

    taken: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kind: str = ""

    def __str__(self) -> str:
        lines = [
            f"{theirs}  →  {ours}" if theirs != ours else f"{theirs}  taken" for theirs, ours in self.taken.items()
        ]
        lines += [f"{theirs}  ignored: {reason}" for theirs, reason in self.ignored.items()]
        lines += [f"{counted(len(self.taken), 'tensor')} taken, {len(self.ignored)} ignored; projector: {self.kind}"]
        return "\n".join(lines + self.notes)


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a .safetensors file, or of a pickled one, read without running anything.

    Raises:
        WeightsError: it is missing or damaged, or holds more than tensors and numbers.
    """
    if not path.is_file():
        raise WeightsError(f"There is no file '{path.name}'.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path.name} holds more than numbers, so it was not read: it could run anything."
        ) from error
    except (OSError, RuntimeError, SafetensorError, EOFError) as error:
        raise WeightsError(f"{path.name} is damaged or cannot be read.") from error
