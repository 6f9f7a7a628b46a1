"""Figures made of what was measured: unbiased, additive, and with standard errors that are true."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tezo_ds.directions.space import Matrix
from tezo_ds.probing_layers.figures import Figures, Horizon, standard_error
from tezo_ds.probing_layers.measure import Measured

RANK = 5


def one(slopes: Tensor, bends: Tensor | None = None, rank: int | None = None) -> Measured:
    """Makes what would be measured of a matrix with such coefficients of the gradient."""
    matrix = Matrix("w", (9, 8), rank or slopes.shape[1])
    bends = torch.ones_like(slopes) if bends is None else bends
    return Measured([matrix], slopes * matrix.rank**0.5, bends * matrix.rank)


def drawn(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.randn(n, RANK, generator=generator, dtype=torch.float64) * 3 + 0.5
    return slopes, torch.randn(n, RANK, generator=generator, dtype=torch.float64) + 2


def naive(slopes: Tensor, bends: Tensor) -> tuple[float, float, float]:
    """Computes s over pairs of examples, S and tr H as they are defined."""
    n = len(slopes)
    pairs = [float(slopes[i] @ slopes[j]) for i in range(n) for j in range(n) if i != j]
    noise = float(slopes.var(dim=0).sum())
    return sum(pairs) / len(pairs), noise, float(bends.sum(dim=1).mean())


def test_figures_are_as_defined_with_each_example_left_out() -> None:
    slopes, bends = drawn(6, 0)
    found = Figures.of(one(slopes, bends))
    torch.testing.assert_close((found.gradient, found.noise, found.trace), naive(slopes, bends))
    for i in range(6):
        rest = [j for j in range(6) if j != i]
        expected = naive(slopes[rest], bends[rest])
        torch.testing.assert_close(tuple(found.sums[:, 1 + i].tolist()), expected)


def test_single_columns_make_up_the_whole() -> None:
    slopes, bends = drawn(8, 1)
    whole = Figures.of(one(slopes, bends))
    parts = [
        Figures.of(one(slopes[:, k : k + 1], bends[:, k : k + 1], rank=RANK)) for k in range(RANK)
    ]
    mean = torch.stack([part.sums for part in parts]).mean(dim=0)
    torch.testing.assert_close(mean, whole.sums)


def test_figures_add_up() -> None:
    parts = [Figures.of(one(*drawn(8, seed))) for seed in range(3)]
    total = Figures.total(parts)
    assert total.coefficients == 3 * RANK and total.matrices == 3
    assert math.isclose(total.gradient, sum(part.gradient for part in parts))


def test_they_are_unbiased_and_errors_are_true() -> None:
    """s is |∇|² although S/n is a third of it, and the jackknife tells how far it scatters."""
    n, found = 24, [Figures.of(one(*drawn(24, seed))) for seed in range(400)]
    s = torch.tensor([figures.gradient for figures in found], dtype=torch.float64)
    expected = RANK * 0.25
    assert abs(s.mean() - expected) < 4 * s.std() / math.sqrt(len(s))
    noise = torch.tensor([figures.noise for figures in found], dtype=torch.float64)
    assert abs(noise.mean() - RANK * 9) < 4 * noise.std() / math.sqrt(len(s))
    assert float(noise.mean()) / n > expected  # so without taking it off, s would be twice as large
    told = torch.tensor([figures.errors for figures in found], dtype=torch.float64)
    told = told.square().mean(dim=0).sqrt()
    assert 0.85 < told[0] / s.std() < 1.5  # where ∇ is lost in noise, the jackknife tells too much
    assert 0.88 < told[1] / noise.std() < 1.1


def test_the_gain_is_that_of_the_best_step_along_one_direction() -> None:
    """Against the mean over many directions and batches, on a bowl of many coefficients."""
    d, batch, trials = 300, 4, 40000
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(d, generator=generator, dtype=torch.float64)
    curvature = torch.rand(d, generator=generator, dtype=torch.float64) + 0.5
    s, noise, trace = float(gradient @ gradient), d * 9.0, float(curvature.sum())
    figures = Figures(torch.tensor([[s], [noise], [trace]], dtype=torch.float64), d)
    eta = s / ((s + noise / batch) * trace)
    lower = 0.0
    for _ in range(trials // 1000):
        shape = (1000, d)
        tau = torch.randn(shape, generator=generator, dtype=torch.float64)
        error = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 / math.sqrt(batch)
        kappa = (tau * (gradient + error)).sum(dim=1)
        step = -eta * kappa[:, None] * tau
        lower -= float((step @ gradient + (step.square() @ curvature) / 2).sum()) / trials
    assert figures.gains(batch)[0].item() == pytest.approx(lower, rel=0.05)


def test_many_steps_come_to_the_bottom_and_few_add_up() -> None:
    figures = Figures(torch.tensor([[2.0], [40.0], [50.0]], dtype=torch.float64), 100)
    gain = figures.gains(8)[0].item()
    assert figures.decreases(Horizon(8, 1))[0].item() == pytest.approx(gain, rel=0.01)
    bottom = 100 * 2.0 / (2 * 50.0)
    assert figures.decreases(Horizon(8, 10**6))[0].item() == pytest.approx(bottom)
    assert figures.ratio == pytest.approx(2.0 / 100)


def test_nothing_is_gained_without_gradient_or_curvature() -> None:
    for sums in ([[-1.0], [1.0], [1.0]], [[1.0], [1.0], [-1.0]]):
        figures = Figures(torch.tensor(sums, dtype=torch.float64), 4)
        assert figures.gains(8).item() == figures.decreases(Horizon(8, 10)).item() == 0


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = drawn(30, 3)[0][:, 0]
    left_out = (x.sum() - x) / 29
    values = torch.cat([x.mean()[None], left_out])
    assert standard_error(values) == pytest.approx(float(x.std()) / math.sqrt(30))
