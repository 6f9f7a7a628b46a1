"""`rho: auto`: the radius at which a model's slopes are least wrong, in the dtype that it computes in.

A slope κ(ρ), of central differences (p = 2) or forward ones (p = 1), errs in two ways, of root mean square

    n/ρ     rounding: n = σ/√2 (p = 2) or √2 σ (p = 1), σ the noise of one loss
    b ρ^p   bending: b of the third derivative along a direction (p = 2) or of the second (p = 1)

whose sum of squares is least at ρ* = (n / (√p b))^(1/(p+1)). Both are measured. A few directions are
measured at ρ_0 < ρ_1 < …, each GROWTH times the one before. Two neighbours differ by a root mean square D_i,

    D_i² = n² (1/ρ_i² + 1/ρ_{i+1}²) + b² (ρ_{i+1}^p - ρ_i^p)²

so each pair bounds n, and b, by what it would be if the other were 0. R_i = D_i / rms κ(ρ_{i+1}) is above 1
where slopes are noise, falls as they emerge, and rises where they bend away. Around the least R_i the pair
below it is mostly noise and the pair above it mostly bending: n and b are the smaller of their bounds there.
A model whose bends are unlike b ρ^p gets a radius from among those that were measured, nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tezo_ds.directions.branches import Ask, kappas
from tezo_ds.errors import ProbeError

STEP = 2**31 - 1  # step of the directions that are measured; no run gets as far
DIRECTIONS = 6  # with fewer, noise agrees by chance too often
GROWTH = 4.0
LARGEST = 1.0  # no ρ is above this
START = 4e-6  # the smallest, in float32; in proportion to ε^(1/3) in others, as ρ* is
RISE = 2.0  # R this much above its least ends the search
CLEAR = 0.5  # if the least is below this; where R is above, bends are no longer like b ρ^p

Measure = Callable[[Ask], Tensor]


@dataclass(frozen=True)
class Radius:
    """A choice of ρ, and the estimates behind the choice.

    Attributes:
        rho: ρ.
        noise: σ, root mean square of a loss's rounding, in units of the loss.
        bend: b, in units of the loss over ρ^(p+1).
        slope: root mean square of κ where it was measured best.
        error: estimated root mean square error of κ at ρ.
        tried: each pair's smaller ρ and its R.
    """

    rho: float
    noise: float
    bend: float
    slope: float
    error: float
    tried: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        share = 100 * self.error / self.slope
        return (
            f"rho auto: {self.rho:.2g}, where slopes, {self.slope:.3g}, are about {share:.2g} % off"
        )


@dataclass(frozen=True)
class _Pair:
    """Slopes at ρ and at GROWTH ρ.

    Attributes:
        rho: the smaller ρ.
        differ: D.
        slope: root mean square of κ at the larger ρ.
        order: p.
        noise, bend: bounds of n and b.
    """

    rho: float
    differ: float
    slope: float
    order: int

    @property
    def ratio(self) -> float:
        """R; infinite where there is no slope or a loss was not finite."""
        return self.differ / self.slope if self.slope > 0 else math.inf

    @property
    def noise(self) -> float:
        return self.differ * self.rho / math.hypot(1, 1 / GROWTH)

    @property
    def bend(self) -> float:
        return self.differ / (self.rho**self.order * (GROWTH**self.order - 1))


def choose_rho(measure: Measure, dtype: torch.dtype, central: bool = True) -> Radius:
    """Chooses the radius to train with, the same on all ranks that have the same losses.

    Args:
        measure: gives the losses of some branches, float64 (branches,) on the CPU, over all ranks; must
            leave weights as they were.
        dtype: dtype that the model computes in; the coarsest of several.
        central: whether training takes two branches a direction, or one and a centre.

    Raises:
        ProbeError: no two radii agree on slopes, which are noise, or 0.
    """
    pairs: list[_Pair] = []
    before: Tensor | None = None
    rho = START * (torch.finfo(dtype).eps / torch.finfo(torch.float32).eps) ** (1 / 3)
    while rho <= LARGEST and not _rises(pairs):
        losses = measure(Ask.of(STEP, range(DIRECTIONS), rho, central))
        kappa = kappas(losses[None], rho, central)[0]
        if before is not None:
            pairs.append(_pair(before, kappa, rho / GROWTH, 2 if central else 1))
        before, rho = kappa, rho * GROWTH
    ratios = [pair.ratio for pair in pairs]
    best = ratios.index(min(ratios))
    if ratios[best] >= 1:
        raise ProbeError(
            f"rho auto: slopes at radii from {pairs[0].rho:.1g} to {pairs[-1].rho * GROWTH:.1g} have nothing "
            "in common, so they are noise; set rho, take larger batches, or check that the chosen "
            "parameters act on the loss"
        )
    return _least_error(pairs, best)


def _pair(below: Tensor, above: Tensor, rho: float, order: int) -> _Pair:
    if not bool((below.isfinite() & above.isfinite()).all()):
        return _Pair(rho, math.inf, 0.0, order)
    return _Pair(rho, _rms(below - above), _rms(above), order)


def _rises(pairs: list[_Pair]) -> bool:
    """Returns whether the last pair is clearly past the best one."""
    if not pairs:
        return False
    least = min(pair.ratio for pair in pairs)
    return least < CLEAR and pairs[-1].ratio > RISE * least


def _least_error(pairs: list[_Pair], best: int) -> Radius:
    """Returns ρ* by the pairs around the best one, within the radii that these pairs compare."""
    near = [pair for pair in pairs[max(0, best - 1) : best + 2] if math.isfinite(pair.ratio)]
    p = near[0].order
    straight = [
        pair for pair in near if pair.ratio < CLEAR or pair is pairs[best]
    ]  # others say too little of b
    noise, bend = min(pair.noise for pair in near), min(pair.bend for pair in straight)
    rho = (noise / (math.sqrt(p) * bend)) ** (1 / (p + 1)) if bend > 0 else math.inf
    rho = min(max(rho, near[0].rho), near[-1].rho * GROWTH)
    return Radius(
        rho=rho,
        noise=noise * (math.sqrt(2) if p == 2 else math.sqrt(0.5)),
        bend=bend,
        slope=pairs[best].slope,
        error=math.hypot(noise / rho, bend * rho**p),
        tried=tuple((pair.rho, pair.ratio) for pair in pairs),
    )


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
