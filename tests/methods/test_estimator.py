"""E[Z⟨G, Z⟩] = r·G, and the relative variance 1 + mn + (2mn + 6(m + n) + 10)/r of κZ/r."""

from __future__ import annotations

import pytest
import torch

from tezo_ds.rng.philox import derive_key, normals

SAMPLES = 400_000


def directions(m: int, n: int, r: int, samples: int) -> torch.Tensor:
    """Draws Z of many runs, (samples, m, n) float64, from the generator that the engine uses."""

    def draw(purpose: str, width: int) -> torch.Tensor:
        key = derive_key(0, "estimator", purpose)
        return normals(key, torch.arange(samples), width).double()

    U, V = draw("U", m * r).view(-1, m, r), draw("V", n * r).view(-1, n, r)
    return (U * draw("tau", r)[:, None]) @ V.transpose(1, 2)


@pytest.mark.parametrize(("m", "n", "r"), [(3, 2, 1), (2, 3, 4), (4, 3, 2)])
def test_estimator_is_unbiased_with_the_known_variance(m: int, n: int, r: int) -> None:
    Z = directions(m, n, r, SAMPLES)
    G = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kappa = (Z * G).sum(dim=(1, 2))  # slope of a linear loss, (samples,)
    estimate = kappa[:, None, None] * Z / r
    spread = estimate.std(dim=0) / SAMPLES**0.5
    assert ((estimate.mean(dim=0) - G).abs() < 4.5 * spread).all()
    squares = (estimate - G).square().sum(dim=(1, 2)) / G.square().sum()
    expected = 1 + m * n + (2 * m * n + 6 * (m + n) + 10) / r
    error = squares.std() / SAMPLES**0.5
    assert abs(squares.mean() - expected) < 5 * error
    assert error < 0.1 * expected  # tight enough to tell the formula from its neighbours
