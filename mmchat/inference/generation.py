"""Embeddings → text, token by token."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import closing
from itertools import count, takewhile
from typing import Any

import torch
from torch import nn

from ..conversation import SamplingOptions
from .decoder import Cache, Decoder


def stop_token_ids(model: nn.Module) -> set[int]:
    """Every token that ends an answer, as ``load_language_model`` set them."""
    return set(model.generation_config.eos_token_id)


def stream_text(
    decoder: Decoder, tokenizer: Any, embeddings: torch.Tensor, options: SamplingOptions, cache: Cache | None = None
) -> Iterator[str]:
    """The answer in pieces that are whole characters.

    Closing the iterator ends the work: nothing is computed before the next piece is asked for.

    Args:
        embeddings: [1, length, hidden_size], the prompt, or its end behind what the cache holds.
        cache: grows; an empty one, with the adapter, if None.
        options: of which ``beams`` do not count; they are ``generate_texts``'s business.
    """
    from tokenizers.decoders import DecodeStream

    text = DecodeStream(skip_special_tokens=True)
    with closing(stream_token_ids(decoder, embeddings, options, stop_token_ids(decoder.model), cache)) as token_ids:
        for token_id in token_ids:
            piece = text.step(tokenizer.backend_tokenizer, token_id)
            if piece:
                yield piece


@torch.inference_mode()
def stream_token_ids(
    decoder: Decoder, embeddings: torch.Tensor, options: SamplingOptions, stop_ids: set[int], cache: Cache | None = None
) -> Iterator[int]:
    """Token ids one by one, without the one that ends the answer."""
    process = _logits_processors(options)
    generator = torch.Generator(embeddings.device)
    generator.manual_seed(options.seed) if options.seed is not None else generator.seed()
    cache = decoder.new_cache() if cache is None else cache
    written = torch.empty(1, 0, dtype=torch.long, device=embeddings.device)  # [1, tokens of the answer]
    logits = decoder.prefill(embeddings, cache)  # [1, vocabulary]
    while True:
        token = _choose(process(written, logits.float()), options.temperature, generator)  # [1, 1]
        token_id = token.item()
        if token_id in stop_ids:
            return
        yield token_id
        written = torch.cat([written, token], dim=1)
        if written.shape[1] == options.max_new_tokens:
            return
        logits = decoder.step(token, cache)


@torch.inference_mode()
def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[torch.Tensor],
    options: SamplingOptions,
    *,
    prefixes: Sequence[Hashable] = (),
    prefix_length: int = 0,
) -> list[str]:
    """The answers to several prompts at once, each as it would be by itself: greedily, or by beam search.

    Args:
        prompts: [length, hidden_size] each; they may differ in length.
        options: of which temperature, top_p and seed do not count.
        prefixes: one key for each prompt; prompts with equal keys begin alike, and their prefix is computed once.
        prefix_length: how many tokens of each prompt are its prefix; 0 shares nothing.
    """
    longest, width = max(len(prompt) for prompt in prompts), prompts[0].shape[1]
    gaps = [longest - len(prompt) for prompt in prompts]
    # Padded behind the prefix, so that every answer begins at the right end of its row.
    parts = [
        (prompt[:prefix_length], prompt.new_zeros(gap, width), prompt[prefix_length:])
        for prompt, gap in zip(prompts, gaps, strict=True)
    ]
    embeddings = torch.stack([torch.cat(part) for part in parts])  # [prompts, longest, hidden_size]
    place = torch.arange(longest)  # [longest]
    is_token = (place < prefix_length) | (place >= prefix_length + torch.tensor(gaps)[:, None])  # [prompts, longest]
    stop_ids = stop_token_ids(model)
    cache = _prefill(model, embeddings, prefixes, prefix_length, options.beams) if prefix_length else None
    token_ids = model.generate(
        inputs_embeds=embeddings,
        attention_mask=is_token.long().to(embeddings.device),
        generation_config=_beam_settings(options, stop_ids),
        past_key_values=cache,
    )  # [prompts, tokens]: what is new only
    written = [list(takewhile(lambda token_id: token_id not in stop_ids, row)) for row in token_ids.tolist()]
    return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]


def _prefill(model: nn.Module, embeddings: torch.Tensor, prefixes: Sequence[Hashable], length: int, beams: int) -> Any:
    """The keys and values of each prompt's prefix, from one pass over the different ones."""
    from transformers import DynamicCache

    first = {}
    for row, prefix in enumerate(prefixes):
        first.setdefault(prefix, row)
    number = {prefix: index for index, prefix in enumerate(first)}
    cache = DynamicCache(config=model.config)
    different = embeddings[list(first.values()), :length]  # [prefixes, length, hidden_size]
    model(inputs_embeds=different, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.batch_select_indices(torch.tensor([number[prefix] for prefix in prefixes], device=embeddings.device))
    if beams > 1:
        cache.batch_repeat_interleave(beams)
    return cache


def _beam_settings(options: SamplingOptions, stop_ids: set[int]) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=options.beams,
        max_new_tokens=options.max_new_tokens,
        repetition_penalty=options.repetition_penalty or 1.0,
        eos_token_id=sorted(stop_ids),
        pad_token_id=next(token_id for token_id in count() if token_id not in stop_ids),  # behind a finished answer
    )


def _logits_processors(options: SamplingOptions):
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopPLogitsWarper,
    )

    process = LogitsProcessorList()
    if options.repetition_penalty not in (None, 1):
        process.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.temperature > 0:
        process.append(TemperatureLogitsWarper(float(options.temperature)))
        if options.top_p < 1:
            process.append(TopPLogitsWarper(options.top_p))
    return process


def _choose(scores: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    if temperature == 0:
        return scores.argmax(dim=-1, keepdim=True)
    return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)
