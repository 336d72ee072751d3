"""Comparisons up to rounding, for results of different implementations or processors."""

from __future__ import annotations

import torch

ROUNDING = 1e-5  # relative to the largest value; 80 times float32 rounding, enough for a few layers


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float = ROUNDING) -> None:
    """No value differs by more than ``relative`` times the largest one of the tensor.

    Not times itself: a sum that comes out near 0 is rounded as much as its terms, which are not.
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
