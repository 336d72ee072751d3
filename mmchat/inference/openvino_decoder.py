"""A decoder on OpenVINO with 8-bit weights and inputs, for a CPU that serves many people at once.

All answers in progress share a pass, and a pass for four tokens takes little longer than one for a single token. For
one answer alone, llama.cpp is faster (``llama_decoder.py``).

Groups of weights, and of the inputs of each matrix product, are rounded to 8 bits with a common scale, so logits are
close but not equal to PyTorch's. The adapter is merged into weights of its own: beside the base model's, it would cost
two small products for each layer. Of PyTorch's weights, only the token embeddings are read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from ..errors import MmchatError
from ..fetching.cache import convert_once, remove_oldest
from ..models.language_model import has_layout
from ..models.openvino_graph import MODEL_TYPES, ROPE_TYPES, Shape, import_openvino, quantized_weights
from ..models.stored_language_model import has_adapter, loaded, weights_digest
from .batch import Batch
from .paged_cache import PagedCache, PagedModel, PagedRows

logger = logging.getLogger(__name__)

FILE = "model.safetensors"
CACHED_BYTES = 4e9  # of converted models, of which each adapter has its own


def load_openvino_decoder(model: nn.Module) -> OpenVinoDecoder | None:
    """The OpenVINO decoder of a language model, converted on first use; None if the model is not supported.

    MMCHAT_DECODER=openvino in the environment asks for it.

    Args:
        model: the language model, with or without a LoRA adapter.
    """
    if os.environ.get("MMCHAT_DECODER") != "openvino" or not has_layout(model, MODEL_TYPES, ROPE_TYPES):
        return None
    try:
        import_openvino()  # there are systems without a wheel
        whole = cache(lambda: loaded(model))  # read once, and only if a file is missing
        merges = (False, True) if has_adapter(model) else (False,)
        files = {merge: _converted(model, whole, merge) for merge in merges}
        decoder = OpenVinoDecoder(model, files)
    except (MmchatError, ImportError, OSError, MemoryError) as error:
        logger.warning("OpenVINO cannot run this model: %s", error)
        return None
    remove_oldest("openvino-*", CACHED_BYTES, [path.parent for path in files.values()])
    logger.info("Decoding with OpenVINO and 8-bit weights")
    return decoder


def _converted(model: nn.Module, whole: Callable[[], nn.Module], merge: bool) -> Path:
    """The file with the weights of the base model, or of it with the adapter merged.

    Args:
        whole: returns the model with its weights and adapter layers.
    """

    def convert(folder: Path) -> None:
        save_file(quantized_weights(whole(), merge=merge), folder / FILE)

    # "1" is the version of convert: raise it when its output changes
    return convert_once(f"openvino-1-{weights_digest(model, merge)}", convert) / FILE


class OpenVinoDecoder:
    """A ``Decoder`` on OpenVINO.

    Args:
        model: the language model.
        files: its weights, False → the base model's, True → with the adapter merged, if it has one.
    """

    def __init__(self, model: nn.Module, files: dict[bool, Path]):
        self.model, self.files = model, files
        shape, threads = Shape.of(model.config), torch.get_num_threads()
        self._models = {merged: PagedModel(path, shape, threads) for merged, path in files.items()}
        self.batch = Batch(PagedRows(self._embedding))

    def new_cache(self, with_adapter: bool = True) -> PagedCache:
        return PagedCache(self._models.get(with_adapter, self._models[False]), with_adapter)

    def prefill(self, embeddings: torch.Tensor, cache: PagedCache) -> torch.Tensor:
        return torch.from_numpy(cache.model.extend([cache], [embeddings[0].float().numpy()]))

    def _embedding(self, token_id: int) -> np.ndarray:
        """A token's embedding, [hidden_size]."""
        weight = self.model.get_input_embeddings().weight.detach()  # [vocabulary, hidden_size]
        if weight.dtype != torch.float32:  # NumPy knows no bfloat16
            return np.array(weight[token_id].float())
        return np.array(weight.numpy()[token_id])  # NumPy finds a row in a third of PyTorch's time
