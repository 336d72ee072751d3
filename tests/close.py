"""Comparisons up to rounding, for results of different implementations or processors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mmchat.inference.sampling import Sampler

ROUNDING = 1e-5  # relative to the largest value; 80 times float32 rounding, enough for a few layers
# Two runs of llama.cpp that sum in another order differ by rounding until an input crosses the boundary between two
# 8-bit codes. By the last layer they differ as much as each does from fp32: the logits of `smol` by a few percent of
# their spread, which is 1% of the largest.
INT8_RUN_TO_RUN = 0.02
# 8-bit weights and inputs are off by about 0.5% of their spread. Two random layers with sharp attention amplify that to
# a few percent of the logits' spread. A missing part changes them by more than half.
INT8_ERROR = 0.15


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float = ROUNDING) -> None:
    """No value differs by more than ``relative`` times the largest one of the tensor.

    Relative to the largest, not to each value itself: a sum near 0 carries the rounding of its terms.
    """
    largest = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=relative * largest, rtol=0)


def assert_learned_alike(found: torch.Tensor, expected: torch.Tensor, relative: float = 1e-3) -> None:
    """Weights after some steps of Adam differ by at most ``relative`` times their norm.

    Adam divides a gradient by its size, so the few that are near 0 may turn a rounding into a whole step: numbers are
    not comparable one by one, the tensor as a whole is.
    """
    assert found.shape == expected.shape and found.dtype == expected.dtype
    distance = torch.linalg.vector_norm(found.float() - expected.float())
    assert distance <= relative * torch.linalg.vector_norm(expected.float()), float(distance)


@contextmanager
def recorded_logits() -> Iterator[list[torch.Tensor]]:
    """Collects the logits, [vocabulary], from which our greedy answers take their tokens, the stop token included."""
    found: list[torch.Tensor] = []
    choose = Sampler.__call__

    def record(sampler: Sampler, logits: torch.Tensor) -> int:
        found.append(torch.tensor(sampler.scores(logits)))
        return choose(sampler, logits)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Sampler, "__call__", record)
        yield found


def assert_same_choices(found: list[torch.Tensor], expected: list[torch.Tensor], relative: float = ROUNDING) -> None:
    """Two greedy answers choose from the same logits, [vocabulary] each, up to rounding.

    Where two tokens are equally likely, rounding decides, and the answers may go on differently.
    """
    for one, other in zip(found, expected, strict=False):
        assert_close(one, other, relative)
        if one.argmax() != other.argmax():
            return
    assert len(found) == len(expected)


def certain_answer(engine: Any, messages: Any, options: Any, relative: float = 1e-4) -> tuple[str, bool]:
    """A greedy answer up to the first token that rounding decides, and whether that is all of it.

    ``relative`` is the rounding, relative to the largest logit.
    """
    with recorded_logits() as logits:
        text = "".join(engine.reply(messages, options))
    best = torch.stack(logits).topk(2, dim=1)  # [tokens, 2]
    is_tie = (best.values[:, 0] - best.values[:, 1] <= relative * torch.stack(logits).abs().amax(dim=1)).tolist()
    if True not in is_tie:
        return text, True
    certain = best.indices[: is_tie.index(True), 0].tolist()
    return engine.tokenizer.decode(certain, skip_special_tokens=True), False
