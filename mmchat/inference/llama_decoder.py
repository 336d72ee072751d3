"""A decoder on llama.cpp with 8-bit weights and inputs, for the CPU.

Decoding reads every weight once per token, so it is bound by memory bandwidth: smaller weights are faster. Blocks of 32
weights, and of 32 inputs of each matrix product, are rounded to 8 bits with a common scale (Q8_0), so logits are close
but not equal to PyTorch's. The adapter is merged into weights of its own: beside the base model's, it would cost two
small products for each layer. PyTorch's token embeddings are read for prompts; those of an answer's
tokens are llama.cpp's own, which have 8 bits, too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import nn

from ..errors import MmchatError
from ..fetching.cache import convert_once, remove_oldest
from ..models.gguf_tensors import ARCHITECTURES, language_model_writer, write_language_model
from ..models.language_model import base_model, has_layout
from ..models.stored_language_model import has_adapter, loaded, weights_digest
from .batch import Batch
from .llama_cpp import load_library
from .llama_rows import LlamaCache, LlamaRows, Weights

logger = logging.getLogger(__name__)

FILE = "model.gguf"
ROPE_TYPES = ("default", "longrope")  # that are converted
CACHED_BYTES = 4e9  # of converted models, of which each adapter has its own
NO_VOCABULARY = "none"  # llama.cpp's name for a model that is given no text


def load_llama_decoder(model: nn.Module) -> LlamaDecoder | None:
    """The llama.cpp decoder of a language model, converted on first use; None if the model is not supported.

    MMCHAT_DECODER=torch in the environment disables it.

    Args:
        model: the language model, with or without a LoRA adapter.
    """
    if os.environ.get("MMCHAT_DECODER") == "torch" or not has_layout(model, ARCHITECTURES, ROPE_TYPES):
        return None
    try:
        load_library()
        whole = cache(lambda: base_model(loaded(model)))  # read once, and only if a file is missing
        merges = (False, True) if has_adapter(model) else (False,)
        files = {merge: _converted(model, whole, merge) for merge in merges}
        decoder = LlamaDecoder(model, files)
    except (MmchatError, OSError, MemoryError) as error:
        logger.warning("llama.cpp cannot run this model; decoding with PyTorch, which is slower: %s", error)
        return None
    remove_oldest("llama-*", CACHED_BYTES, [path.parent for path in files.values()])
    logger.info("Decoding with llama.cpp and 8-bit weights")
    return decoder


def _converted(model: nn.Module, whole: Callable[[], nn.Module], merge: bool) -> Path:
    """The GGUF file of the base model, or of it with the adapter merged.

    Args:
        whole: returns the base model with its weights and adapter layers.
    """

    def convert(folder: Path) -> None:
        writer = language_model_writer(whole(), folder / FILE, short_rope=True)
        writer.add_tokenizer_model(NO_VOCABULARY)
        write_language_model(writer, whole(), "q8_0", merge=merge)

    # "1" is the version of convert: raise it when its output changes
    return convert_once(f"llama-1-{weights_digest(model, merge)}", convert) / FILE


class LlamaDecoder:
    """A ``Decoder`` on llama.cpp.

    Args:
        model: the language model.
        files: its weights, False → the base model's, True → with the adapter merged, if it has one.
    """

    def __init__(self, model: nn.Module, files: dict[bool, Path]):
        self.model, self.files = model, files
        cores = torch.get_num_threads()
        self._weights = {merged: Weights(path, cores) for merged, path in files.items()}
        self.batch = Batch(LlamaRows(cores))

    def new_cache(self, with_adapter: bool = True) -> LlamaCache:
        return LlamaCache(self._weights.get(with_adapter, self._weights[False]), with_adapter)

    def prefill(self, embeddings: torch.Tensor, cache: LlamaCache) -> torch.Tensor:
        context, tokens = cache.weights.contexts[0], embeddings[0].float().contiguous().numpy()  # [tokens, hidden_size]
        logits, cache.state = context.prefill(tokens, cache.state, cache.length)
        cache.length += len(tokens)
        return torch.from_numpy(logits)
