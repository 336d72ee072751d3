"""Interpolates between the weights of two runs, as in WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903)."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..checkpoints.weights_config import CONFIG_FILE
from ..checkpoints.weights_folder import ADAPTER_FOLDER, PROJECTOR_FILE
from ..errors import BadInput, WeightsError
from ..folders import empty_folder
from ..models.language_model import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..models.tagger import TAGGER_FILE
from ..presets import IMAGE_ENCODER_FILE


def average_weights(first: str | Path, second: str | Path, share: float, out: str | Path) -> None:
    """Writes a linear interpolation between the weights of a run and those of a run that started from it.

    The result is often better than either end.

    Args:
        share: the interpolation coefficient: 0 writes ``first``, 1 writes ``second``.

    Raises:
        BadInput: ``share`` is not between 0 and 1, or ``out`` is not empty.
        WeightsError: a file is missing or damaged, or the tensors of the two differ.
    """
    if not 0 <= share <= 1:
        raise BadInput("The share must be between 0 and 1.")
    first, second, out = Path(first), Path(second), empty_folder(out)
    names = [PROJECTOR_FILE, f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}"]
    averaged = {name: _average(first, second, name, share) for name in names if (second / name).is_file()}
    if PROJECTOR_FILE not in averaged:
        raise WeightsError(f"'{second.name}' is not a weights folder: it has no {PROJECTOR_FILE}.")
    for name, tensors in averaged.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / name)
    for name in (CONFIG_FILE, IMAGE_ENCODER_FILE, TAGGER_FILE, f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG}"):
        if (second / name).is_file():
            shutil.copy(second / name, out / name)


def _average(first: Path, second: Path, name: str, share: float) -> dict[str, torch.Tensor]:
    one, other = _read(first, name), _read(second, name)
    if {key: tensor.shape for key, tensor in one.items()} != {key: tensor.shape for key, tensor in other.items()}:
        raise WeightsError(f"{name} of the two folders cannot be averaged: the names or shapes of the tensors differ.")
    return {key: one[key].float().lerp(tensor.float(), share).to(tensor.dtype) for key, tensor in other.items()}


def _read(folder: Path, name: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{name} in '{folder.name}' is missing or damaged.") from error
