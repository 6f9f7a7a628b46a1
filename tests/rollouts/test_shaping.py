"""Shapes of a step's losses beside the formulas, with ties, failed branches and ranks with directions."""

from __future__ import annotations

import math

import pytest
import torch

from tezo_ds.rollouts.shaping import shaped

NAN = math.nan


def values(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-12, atol=1e-12)


def test_formulas_over_all_branches_of_all_ranks() -> None:
    losses = values([3.0, -1.0], [0.5, 7.5])  # two ranks with directions of their own
    mean, deviation = 2.5, losses.flatten().std(correction=0)
    same(shaped(losses, "none", True), losses)
    same(shaped(losses, "centred", True), losses - mean)
    same(shaped(losses, "zscore", True), (losses - mean) / deviation)
    same(shaped(losses, "rank", True), values([2 / 3 - 0.5, -0.5], [1 / 3 - 0.5, 0.5]))


def test_equal_losses_share_a_rank() -> None:
    same(
        shaped(values([4.0, 1.0, 4.0, 4.0, 9.0]), "rank", True), values([0.0, -0.5, 0.0, 0.0, 0.5])
    )


@pytest.mark.parametrize("shape", ["zscore", "rank", "centred"])
def test_all_equal_are_zero(shape: str) -> None:
    """0.1 + 0.1 + 0.1 over 3 is not 0.1: a mean that rounds would make noise of nothing, and 0 / 0 NaN."""
    same(shaped(values([0.1] * 3), shape, True), values([0.0] * 3))
    same(shaped(values([0.1]), shape, True), values([0.0]))


@pytest.mark.parametrize("shape", ["zscore", "rank", "centred"])
def test_failed_branches_stay_out(shape: str) -> None:
    losses = values([NAN, 2.0, 5.0, math.inf, 11.0])
    found = shaped(losses, shape, True)
    same(found[:, [1, 2, 4]], shaped(losses[:, [1, 2, 4]], shape, True))
    assert found[0, 0].isnan() and found[0, 3].isinf() and losses[0, 1] == 2.0
    assert shaped(values([NAN, NAN]), shape, True).isnan().all()


def test_one_sided_slopes_begin_at_the_mean_of_the_population() -> None:
    losses = values([100.0, 1.0, 2.0])
    same(shaped(losses, "centred", False), values([0.0, 1 - 103 / 3, 2 - 103 / 3]))
    same(shaped(losses, "none", False), losses)
    assert shaped(values([NAN, 1.0, 2.0]), "centred", False)[0, 0].isnan()
