"""Streaming: the same tokens as transformers' generate, and no work after the last requested one."""

from __future__ import annotations

import pytest
import torch

from mmchat.conversation import Message, SamplingOptions
from mmchat.errors import BadInput
from mmchat.inference.decoder import TorchDecoder
from mmchat.inference.generation import stop_token_ids, stream_text, stream_token_ids
from tests.close import assert_same_choices, recorded_logits

GREEDY = SamplingOptions(temperature=0, repetition_penalty=1, max_new_tokens=24)


@pytest.fixture(scope="module")
def embeddings(engine):
    return engine.embed(engine.tokenize([Message("user", "Tell me about the sea in three sentences.")]))


@pytest.fixture(scope="module")
def stop_ids(engine):
    return stop_token_ids(engine.language_model)


def count_steps(engine, monkeypatch):
    """Counts forward passes of the language model."""
    steps, forward = [], type(engine.language_model).forward
    monkeypatch.setattr(type(engine.language_model), "forward", lambda *a, **k: (steps.append(1), forward(*a, **k))[1])
    return steps


def generated(engine, embeddings, **options):
    """What transformers' generate chooses from, [vocabulary] for each token."""
    output = engine.language_model.generate(
        inputs_embeds=embeddings,
        attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
        max_new_tokens=24,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    return [row[0] for row in output.scores]


def test_greedy_tokens_equal_those_of_generate(engine, embeddings, stop_ids):
    with recorded_logits() as ours:
        list(stream_token_ids(TorchDecoder(engine.language_model), embeddings, GREEDY, stop_ids))
    assert_same_choices(ours, generated(engine, embeddings), 1e-4)  # thirty layers


def test_the_repetition_penalty_equals_that_of_generate(engine, embeddings, stop_ids):
    options = SamplingOptions(temperature=0, repetition_penalty=1.3, max_new_tokens=24)
    with recorded_logits() as ours:
        list(stream_token_ids(TorchDecoder(engine.language_model), embeddings, options, stop_ids))
    assert_same_choices(ours, generated(engine, embeddings, repetition_penalty=1.3), 1e-4)


def test_ngrams_do_not_repeat(engine, embeddings, stop_ids):
    options = SamplingOptions(temperature=0, repetition_penalty=1, no_repeat_ngram_size=1, max_new_tokens=24)
    with recorded_logits() as ours:
        list(stream_token_ids(TorchDecoder(engine.language_model), embeddings, options, stop_ids))
    theirs = generated(engine, embeddings, no_repeat_ngram_size=1)
    is_open = [row.isfinite() for row in theirs]
    assert all(torch.equal(row.isfinite(), allowed) for row, allowed in zip(ours, is_open, strict=False))
    assert not all(allowed.all() for allowed in is_open), "a token would have repeated"
    assert_same_choices([row.clamp(min=-1e3) for row in ours], [row.clamp(min=-1e3) for row in theirs], 1e-4)


def test_closing_stops_generation_within_a_token(engine, embeddings, stop_ids, monkeypatch):
    steps = count_steps(engine, monkeypatch)
    tokens = stream_token_ids(TorchDecoder(engine.language_model), embeddings, GREEDY, stop_ids)
    next(tokens), next(tokens)
    tokens.close()
    assert len(steps) == 2


def test_a_seed_makes_sampling_reproducible(engine, embeddings, stop_ids):
    def sample(seed):
        options = SamplingOptions(temperature=1.0, max_new_tokens=8, seed=seed)
        return list(stream_token_ids(TorchDecoder(engine.language_model), embeddings, options, stop_ids))

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)) for seed in range(3)}) > 1


def test_max_new_tokens_limits_the_answer(engine, embeddings, stop_ids):
    options = SamplingOptions(temperature=0, max_new_tokens=2)
    assert len(list(stream_token_ids(TorchDecoder(engine.language_model), embeddings, options, stop_ids))) == 2


def test_pieces_are_whole_characters(engine):
    """Emoji and accents take several tokens each; no piece may contain half of one."""
    encoded = engine.tokenize([Message("user", "Repeat exactly: 日本語 😀 café")])
    pieces = list(stream_text(TorchDecoder(engine.language_model), engine.tokenizer, engine.embed(encoded), GREEDY))
    assert len(pieces) > 1
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces).strip()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"max_new_tokens": 0},
        {"repetition_penalty": 0},
        {"temperature": float("nan")},
    ],
)
def test_options_out_of_range_are_rejected(wrong):
    with pytest.raises(BadInput, match="must"):
        SamplingOptions(**wrong)
