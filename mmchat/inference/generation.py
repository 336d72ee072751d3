"""Text generation: streaming token by token, greedy and beam search in batches."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Hashable, Iterator, Sequence
from contextlib import closing
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..conversation import SamplingOptions
from ..models.language_model import switch_adapter
from .batch import Answer
from .beam_search import beam_search, beam_settings
from .decoder import Cache, Decoder
from .sampling import Sampler

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedTokenizerFast

PREFILL_CHUNK = 128  # tokens

# The answer alone should not repeat; transformers warns that the prompt is left out.
warnings.filterwarnings("ignore", message=r"Passing `\w+` with `inputs_embeds` and without `input_ids` to `generate`")


def stop_token_ids(model: nn.Module) -> set[int]:
    """The stop tokens that ``load_language_model`` set."""
    return set(model.generation_config.eos_token_id)


def prefill(decoder: Decoder, embeddings: torch.Tensor, cache: Cache) -> Iterator[torch.Tensor]:
    """Chunked prefill, so that answers in progress advance in between; yields the logits of each chunk.

    Args:
        embeddings: [1, length, hidden_size].

    Yields:
        Logits of the chunk's last token, [1, vocabulary].
    """
    for chunk in embeddings.split(PREFILL_CHUNK, dim=1):
        yield decoder.prefill(chunk, cache)


def stream_text(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerFast,
    embeddings: torch.Tensor,
    options: SamplingOptions,
    cache: Cache | None = None,
) -> Iterator[str]:
    """Prefills a prompt and streams the answer in pieces of whole characters.

    Args:
        embeddings: [1, length, hidden_size], the prompt, or the part of it that the cache lacks.
        cache: is extended by the prompt; a new one, with the adapter, if None.
    """
    cache = decoder.new_cache() if cache is None else cache
    *_, logits = prefill(decoder, embeddings, cache)
    yield from generate_text(decoder, tokenizer, logits, options, cache)


def generate_text(
    decoder: Decoder, tokenizer: PreTrainedTokenizerFast, logits: torch.Tensor, options: SamplingOptions, cache: Cache
) -> Iterator[str]:
    """Streams the answer to a prefilled prompt in pieces of whole characters.

    Each piece is computed when it is requested, so closing the iterator stops generation. A beam search knows its
    answer at the end only, which is one piece.

    Args:
        logits: of the prompt's last token, [1, vocabulary].
        cache: of the prompt; it is not modified.
    """
    from tokenizers.decoders import DecodeStream

    stop_ids = stop_token_ids(decoder.model)
    if options.beams > 1:
        token_ids = beam_search(decoder, logits, options, stop_ids, cache)
        yield tokenizer.decode(_up_to(stop_ids, token_ids), skip_special_tokens=True).strip()
        return
    text = DecodeStream(skip_special_tokens=True)
    with closing(generate_token_ids(decoder, logits, options, stop_ids, cache)) as token_ids:
        for token_id in token_ids:
            piece = text.step(tokenizer.backend_tokenizer, token_id)
            if piece:
                yield piece


def stream_token_ids(
    decoder: Decoder, embeddings: torch.Tensor, options: SamplingOptions, stop_ids: set[int], cache: Cache | None = None
) -> Iterator[int]:
    """Prefills a prompt and streams token ids, without the stop token; see ``stream_text``."""
    cache = decoder.new_cache() if cache is None else cache
    *_, logits = prefill(decoder, embeddings, cache)
    yield from generate_token_ids(decoder, logits, options, stop_ids, cache)


def generate_token_ids(
    decoder: Decoder, logits: torch.Tensor, options: SamplingOptions, stop_ids: set[int], cache: Cache
) -> Generator[int, None, None]:
    """Streams the token ids of the answer to a prefilled prompt, without the stop token."""
    answer = Answer(Sampler(options), stop_ids, options.max_new_tokens)
    yield from decoder.batch.generate(answer, cache, logits[0])


@torch.inference_mode()
def generate_batch(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[torch.Tensor],
    options: SamplingOptions,
    *,
    with_adapter: bool = True,
    prefixes: Sequence[Hashable] = (),
    prefix_length: int = 0,
) -> list[str]:
    """Answers to a batch of prompts, by greedy or beam search. Batching does not change the answers.

    Args:
        prompts: [length, hidden_size] each; lengths may differ.
        options: temperature, top_p and seed are ignored.
        with_adapter: with the adapter on or off; a model without an adapter ignores the flag.
        prefixes: one key per prompt; prompts with equal keys share a prefix, which is prefilled once.
        prefix_length: number of tokens in each prefix; 0 shares nothing.
    """
    switch_adapter(model, with_adapter)
    longest, width = max(len(prompt) for prompt in prompts), prompts[0].shape[1]
    gaps = [longest - len(prompt) for prompt in prompts]
    # The padding follows the prefix, so all answers start in the same column.
    parts = [
        (prompt[:prefix_length], prompt.new_zeros(gap, width), prompt[prefix_length:])
        for prompt, gap in zip(prompts, gaps, strict=True)
    ]
    embeddings = torch.stack([torch.cat(part) for part in parts])  # [prompts, longest, hidden_size]
    position = torch.arange(longest)  # [longest]
    # [prompts, longest]
    is_token = (position < prefix_length) | (position >= prefix_length + torch.tensor(gaps)[:, None])
    stop_ids = stop_token_ids(model)
    cache = _prefill(model, embeddings, prefixes, prefix_length, options.beams) if prefix_length else None
    token_ids = model.generate(
        inputs_embeds=embeddings,
        attention_mask=is_token.long().to(embeddings.device),
        generation_config=beam_settings(options, stop_ids),
        past_key_values=cache,
    )  # [prompts, new tokens]
    written = [_up_to(stop_ids, row) for row in token_ids.tolist()]
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


def _up_to(stop_ids: set[int], token_ids: list[int]) -> list[int]:
    """The token ids before the first stop token."""
    return list(takewhile(lambda token_id: token_id not in stop_ids, token_ids))


def _prefill(
    model: nn.Module, embeddings: torch.Tensor, prefixes: Sequence[Hashable], length: int, beams: int
) -> DynamicCache:
    """KV cache of each prompt's prefix; every distinct prefix is computed once."""
    from transformers import DynamicCache

    first: dict[Hashable, int] = {}  # prefix -> the first row that has it
    for row, prefix in enumerate(prefixes):
        first.setdefault(prefix, row)
    indices = {prefix: index for index, prefix in enumerate(first)}
    cache = DynamicCache(config=model.config)
    distinct = embeddings[list(first.values()), :length]  # [prefixes, length, hidden_size]
    model(inputs_embeds=distinct, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_select_indices(torch.tensor([indices[prefix] for prefix in prefixes], device=embeddings.device))
    if beams > 1:
        cache.batch_repeat_interleave(beams)
    return cache
