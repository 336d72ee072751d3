"""Sampling: the distributions are those of transformers' logits processors."""

from __future__ import annotations

import pytest
import torch

from mmchat.conversation import SamplingOptions
from mmchat.inference.sampling import Sampler
from tests.close import assert_close

VOCABULARY = 4999


def expected(logits, written, options):
    """Probabilities of transformers' processors, [vocabulary]."""
    from transformers import (
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopPLogitsWarper,
    )

    token_ids, scores = torch.tensor([written], dtype=torch.long), logits[None]
    if written:
        scores = RepetitionPenaltyLogitsProcessor(options.repetition_penalty)(token_ids, scores)
    if options.no_repeat_ngram_size:
        scores = NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size)(token_ids, scores)
    scores = TemperatureLogitsWarper(options.temperature)(token_ids, scores)
    if options.top_p < 1:
        scores = TopPLogitsWarper(options.top_p)(token_ids, scores)
    return scores.softmax(dim=-1)[0]


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("penalty", [0.5, 1.1, 3.0])
def test_distributions_equal_those_of_transformers(temperature, top_p, penalty):
    torch.manual_seed(0)
    options = SamplingOptions(temperature, top_p, repetition_penalty=penalty, seed=0)
    choose, written = Sampler(options), []
    for spread in (0.01, 1.0, 8.0, 3.0):
        logits = spread * torch.randn(VOCABULARY)
        token_ids, probabilities = map(torch.from_numpy, choose.distribution(logits))
        ours = torch.zeros(VOCABULARY).index_copy(0, token_ids, probabilities)
        exact = expected(logits, written, options)
        in_both = (ours > 0) & (exact > 0)
        assert int(((ours > 0) ^ (exact > 0)).sum()) <= 2  # sums of thousands round differently
        assert_close(ours[in_both], exact[in_both], 2e-3 if spread == 0.01 else 1e-4)
        written.append(choose(logits))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_repeats(size):
    torch.manual_seed(0)
    options = SamplingOptions(1.0, 1.0, repetition_penalty=1.0, no_repeat_ngram_size=size, seed=0)
    choose, written = Sampler(options), []
    for _ in range(12 if size == 1 else 40):
        logits = torch.cat([torch.randn(16), torch.full((16,), -2.0)])
        token_ids, probabilities = map(torch.from_numpy, choose.distribution(logits))
        ours = torch.zeros(len(logits)).index_copy(0, token_ids, probabilities)
        assert_close(ours, expected(logits, written, options), 1e-5)
        written.append(choose(logits))
    ngrams = [tuple(written[start : start + size]) for start in range(len(written) - size + 1)]
    assert len(ngrams) == len(set(ngrams))


def test_one_token_is_always_left():
    logits = torch.zeros(VOCABULARY)
    logits[7] = 1e4
    token_ids, probabilities = Sampler(SamplingOptions(0.2, 0.9)).distribution(logits)
    assert token_ids.tolist() == [7] and probabilities.tolist() == [1.0]


def test_samples_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -9.0])
    choose = Sampler(SamplingOptions(1.0, 1.0, repetition_penalty=1.0, seed=0))
    counts = torch.bincount(torch.tensor([choose(logits) for _ in range(4000)]), minlength=4)
    assert (counts / 4000 - logits.softmax(dim=0)).abs().max() < 0.03


def test_neighboring_seeds_and_positions_draw_independently():
    """Pairs of four equally likely tokens are equally frequent, at successive positions and for successive seeds."""
    logits, pairs = torch.zeros(4), torch.zeros(2, 4, 4)
    drawn = []
    for seed in range(200):
        choose = Sampler(SamplingOptions(1.0, 1.0, repetition_penalty=1.0, seed=seed))
        drawn.append([choose(logits) for _ in range(40)])
    drawn = torch.tensor(drawn)  # [seeds, positions]
    for counts, one, other in ((pairs[0], drawn[:, :-1], drawn[:, 1:]), (pairs[1], drawn[:-1], drawn[1:])):
        counts.index_put_((one.flatten(), other.flatten()), torch.tensor(1.0), accumulate=True)
    shares = pairs / pairs.sum(dim=(1, 2), keepdim=True)  # of 7,800 or more pairs
    assert (shares - 1 / 16).abs().max() < 0.012  # four standard deviations


def test_a_seed_gives_the_same_token_whatever_the_rounding():
    """Rounding changes the order of equally likely tokens and the end of the nucleus; the token stays the same."""
    torch.manual_seed(0)
    logits = 1e-5 * torch.randn(VOCABULARY)
    nearly = logits + 1e-7 * torch.randn(VOCABULARY)
    choose, choose_nearly = (Sampler(SamplingOptions(0.7, 0.9, seed=3)) for _ in range(2))
    assert not torch.equal(logits.argsort(), nearly.argsort())
    assert [choose(logits) for _ in range(20)] == [choose_nearly(nearly) for _ in range(20)]


def test_a_seed_may_be_negative():
    one, other = (Sampler(SamplingOptions(1.5, 1.0, seed=-1)) for _ in range(2))
    logits = torch.zeros(VOCABULARY)
    assert [one(logits) for _ in range(5)] == [other(logits) for _ in range(5)]


def test_the_penalty_lowers_what_was_written():
    choose = Sampler(SamplingOptions(0, repetition_penalty=2.0))
    logits = torch.tensor([3.0, 2.0, -1.0, -1.5])
    assert [choose(logits) for _ in range(3)] == [0, 1, 0]
