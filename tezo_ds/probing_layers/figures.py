"""Gradient, noise and curvature of matrices from what was measured, with standard errors by the jackknife.

    s     |∇|², unbiased: the mean of g_i·g_j over pairs of different examples, = |mean g|² - S/n
    S     the variance of g_i over examples, summed over coefficients
    tr H  the trace of the mean loss's Hessian by the coefficients

All three add up over matrices, those of the Hessian although its blocks off the diagonal are not seen. Each
number comes with those that leave one example out, so that whatever is made of sums has a standard error.

A step along one direction τ of all D coefficients of a set moves by -η κτ, and E[(τ·ĝ)² τᵀHτ] is
|ĝ|² tr H to 2/D, with |ĝ|² = s + S/B of a batch of B. So it takes ηs - η²(s + S/B) tr H / 2 off the loss, at
the best η

    gain = s² / (2 (s + S/B) tr H)

which without noise is s / (2 tr H). After N such steps of a bowl that is equally steep all around, with
minimum D s / (2 tr H) below, the loss is lower by

    (D s / (2 tr H)) (1 - exp(-N s / ((s + S/B) D)))
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tezo_ds.probing_layers.measure import Measured

LEAST = 4  # examples, of which standard errors can be told at all


@dataclass(frozen=True)
class Horizon:
    """What is foreseen.

    Attributes:
        batch: B, examples of a step.
        steps: N, directions that a run measures: steps times queries.
    """

    batch: int
    steps: int


@dataclass(frozen=True)
class Figures:
    """Figures of a matrix or of a set of them.

    Attributes:
        sums: s, S and tr H, float64 (3, 1 + n): of all examples, and with each of them left out.
        coefficients: D.
        matrices: number of matrices.
    """

    sums: Tensor
    coefficients: int
    matrices: int = 1

    @classmethod
    def of(cls, one: Measured) -> Figures:
        """Makes the figures of one group; columns that were not measured count as those that were."""
        slopes, bends, n = one.slopes, one.bends, len(one.slopes)
        less = torch.cat(
            [slopes.new_zeros(1, slopes.shape[1]), slopes]
        )  # (1 + n, k), what is left out
        count = torch.full((1 + n,), float(n - 1), dtype=torch.float64)
        count[0] = n
        squares = (slopes.square().sum() - less.square().sum(dim=1)) / count
        means = ((slopes.sum(dim=0) - less) / count[:, None]).square().sum(dim=1)
        noise = (squares - means) * count / (count - 1)
        bent = bends.sum(dim=1)
        trace = (bent.sum() - torch.cat([bent.new_zeros(1), bent])) / count
        sums = torch.stack([means - noise / count, noise, trace]) / slopes.shape[1]
        return cls(sums, sum(matrix.rank for matrix in one.group), len(one.group))

    @classmethod
    def total(cls, parts: Iterable[Figures]) -> Figures:
        """Adds up the figures of several matrices, at least one."""
        parts = list(parts)
        return cls(
            torch.stack([part.sums for part in parts]).sum(dim=0),
            sum(part.coefficients for part in parts),
            sum(part.matrices for part in parts),
        )

    @property
    def gradient(self) -> float:
        """s; below 0 where it is lost in noise."""
        return self.sums[0, 0].item()

    @property
    def noise(self) -> float:
        """S."""
        return self.sums[1, 0].item()

    @property
    def trace(self) -> float:
        """tr H."""
        return self.sums[2, 0].item()

    @property
    def errors(self) -> tuple[float, float, float]:
        """Standard errors of s, S and tr H."""
        s, noise, trace = (standard_error(row) for row in self.sums)
        return s, noise, trace

    def gains(self, batch: float) -> Tensor:
        """Returns what a step takes off the loss at best, (1 + n,); 0 where there is no gradient or no
        curvature above noise."""
        s, noise, trace = self.sums
        fine = (s > 0) & (trace > 0)
        return torch.where(fine, s.square() / (2 * (s + noise / batch) * trace), 0.0)

    def decreases(self, horizon: Horizon) -> Tensor:
        """Returns by how much N steps lower the loss in a bowl, (1 + n,); 0 as in `gains`."""
        s, noise, trace = self.sums
        fine, d = (s > 0) & (trace > 0), self.coefficients
        rate = s / ((s + noise / horizon.batch) * d)
        gone = -torch.expm1(-horizon.steps * rate)
        return torch.where(fine, d * s / (2 * trace) * gone, 0.0)

    @property
    def ratio(self) -> float:
        """s / (2 tr H), the gain of a step without noise; 0 as in `gains`."""
        return self.gains(math.inf)[0].item()


def standard_error(values: Tensor) -> float:
    """Returns the jackknife's standard error of a number (1 + n,): of all, and with each example left out."""
    left_out = values[1:]
    n = len(left_out)
    spread = (left_out - left_out.mean()).square().sum()
    return math.sqrt((n - 1) / n * spread.item())
