"""Slopes and bends of every example's loss along columns of matrices, from forwards alone.

The k-th direction of a group of matrices moves the k-th coefficient of each by ρ√r / √m, r its rank and m
their number: as far as a step's ρτ moves a matrix. With e_k = Σ √r e_ℓk and ε = ρ / √m,

    slope_ik = (l_i(+ε) - l_i(-ε)) / 2ε              along e_k
    bend_ik  = (l_i(+ε) + l_i(-ε) - 2 l_i(0)) / ε²   along e_k twice

Of a single matrix these are √r times a coefficient of the gradient, and r times a diagonal element of the
Hessian; so the mean over all r columns of the squares, and of the bends, is exact. These are unit vectors, as
r random τ in their place, shared by all examples, leave an error of √(2/r) for the same number of forwards.
Fewer columns, and matrices that move together, estimate the same sums: columns of U and V are independent,
so terms across matrices are 0 on average.

Matrices of a band of layers share forwards: what comes before the band runs once an example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tezo_ds.directions.branches import LowRank
from tezo_ds.directions.lowrank import FixedFactors
from tezo_ds.directions.space import CoefficientSpace, Matrix
from tezo_ds.errors import ProbeError
from tezo_ds.losses.objective import Objective
from tezo_ds.probes import listed
from tezo_ds.probes.fused import FusedProbe
from tezo_ds.probing_layers.losses import labelled_rows, losses_of
from tezo_ds.sharding.base import Sharding
from tezo_ds.trunk.trunk import Trunk

Batch = tuple[
    Mapping[str, Any], int
]  # this rank's examples, and the place of the first among all n


Group = Sequence[Matrix]  # matrices that move together
Band = Sequence[Group]  # groups whose forwards begin at the same block


@dataclass(frozen=True)
class Asked:
    """What to measure.

    Attributes:
        bands: all groups of matrices, band by band.
        seed: the run's seed, of U and V.
        batches: this rank's batches, as many on every rank; one without labels where its examples have run
            out.
        examples: n, examples over all ranks.
        columns: columns to measure along, at most the rank.
        rho: ρ, of N(0, 1) directions.
        at_once: branches in one forward, at least 1.
        trunk: whether to run what comes before a band once for all branches.
    """

    bands: Sequence[Band]
    seed: int
    batches: Sequence[Batch]
    examples: int
    columns: int
    rho: float
    at_once: int
    trunk: bool = True

    @property
    def matrices(self) -> list[Matrix]:
        """All matrices."""
        return [matrix for band in self.bands for group in band for matrix in group]

    def width(self, group: Group) -> int:
        """Returns the number of columns that a group is measured along."""
        return min(self.columns, *(matrix.rank for matrix in group))

    @property
    def branches(self) -> int:
        """Branches of each example, the centre of each band included."""
        return sum(2 * self.width(group) for band in self.bands for group in band) + len(self.bands)


@dataclass(frozen=True)
class Measured:
    """What was measured of one group: float64 (n, columns) each, scaled so that the mean over the n examples
    is the derivative of the mean loss."""

    group: Group
    slopes: Tensor
    bends: Tensor


def measure(
    sharding: Sharding, objective: Objective, asked: Asked,
    progress: Callable[[float], None] | None = None,
) -> list[Measured]:  # fmt: skip
    """Measures each group; the same result on every rank. All ranks of the world must call it.

    Sends a message a band, of 16 n bytes for each column of each group, and n numbers once.

    Args:
        sharding: the model; its weights are only read, as they are.
        objective: cross-entropies of the model.
        asked: what to measure.
        progress: takes the share that is done.

    Raises:
        ProbeError: a matrix is out of the fused probe's reach; no example has a label; no loss differs.
    """
    sharding.module.eval()
    names = [matrix.name for matrix in asked.matrices]
    every = FixedFactors(CoefficientSpace(asked.matrices, asked.seed))
    if gaps := FusedProbe.gaps(sharding, names, every):
        raise ProbeError(
            f"the layers' probe is the fused one, which cannot reach {listed(gaps)}; add it to exclude"
        )
    counts = _counts(sharding, objective, asked)
    if not bool(counts.sum()):
        raise ProbeError("no example carries a label; check the labels and --max-length")
    scale = asked.examples / counts.sum()
    found: list[Measured] = []
    with _left_as_it_was(objective):
        done = 0

        def one_batch() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done / (len(asked.bands) * len(asked.batches)))

        for band in asked.bands:
            found += _band(sharding, objective, asked, band, scale, one_batch)
    if not any(bool(one.slopes.any()) for one in found):
        raise ProbeError(
            f"no loss differs at ρ {asked.rho:g} along {names[0]} or any other matrix; raise rho, or check "
            "that they take part in the forward"
        )
    return found


@contextmanager
def _left_as_it_was(objective: Objective) -> Iterator[None]:
    before = objective.trunk
    try:
        yield
    finally:
        objective.trunk = before


def _counts(sharding: Sharding, objective: Objective, asked: Asked) -> Tensor:
    """Returns the labels of each example, float64 (n,); the first plain forward shows how the model takes its
    logits."""
    counts = torch.zeros(asked.examples, dtype=torch.float64)
    objective.trunk = None
    objective(asked.batches[0][0], 1)
    for batch, first in asked.batches:
        rows = labelled_rows(objective, batch)
        counts.index_add_(0, first + rows, torch.ones(len(rows), dtype=torch.float64))
    return sharding.all_reduce(counts.to(sharding.device)).cpu()


def _band(
    sharding: Sharding, objective: Objective, asked: Asked, band: Band, scale: Tensor,
    one_batch: Callable[[], None],
) -> list[Measured]:  # fmt: skip
    space = CoefficientSpace([matrix for group in band for matrix in group], asked.seed)
    factors = FixedFactors(space)
    probe = FusedProbe(sharding, factors)
    directions, radii = _directions(asked, band, space)
    c = torch.zeros(2 * len(radii) + 1, 1, space.numel, dtype=torch.float64)
    c[:-1:2, 0], c[1:-1:2, 0] = radii[:, None] * directions, -radii[:, None] * directions
    probe.trunk = objective.trunk = Trunk(sharding, space.slices, False) if asked.trunk else None
    pairs = LowRank(c[:2], factors)
    with probe.held(pairs):
        objective.settle(asked.batches[0][0], len(pairs))
    sums = torch.zeros(2, asked.examples, len(radii), dtype=torch.float64)
    for batch, first in asked.batches:
        losses = _losses(objective, probe, batch, c.split(asked.at_once), factors)
        plus, minus, centre = losses[:-1:2], losses[1:-1:2], losses[-1]  # (columns, B), (B,)
        both = torch.stack([plus - minus, plus + minus - 2 * centre])  # (2, columns, B)
        if len(labelled_rows(objective, batch)):  # and not a filler where examples have run out
            sums[:, first : first + both.shape[2]] = both.transpose(1, 2)
        one_batch()
    sums = sharding.all_reduce(sums.to(sharding.device)).cpu() * scale
    slopes, bends = sums[0] / (2 * radii), sums[1] / radii**2
    widths = [asked.width(group) for group in band]
    parts = zip(band, slopes.split(widths, 1), bends.split(widths, 1), strict=True)
    return [Measured(*part) for part in parts]


def _directions(asked: Asked, band: Band, space: CoefficientSpace) -> tuple[Tensor, Tensor]:
    """Returns e_k of every group, float64 (columns, D), and ε of each, (columns,)."""
    directions, radii = [], []
    for group in band:
        for k in range(asked.width(group)):
            direction = torch.zeros(space.numel, dtype=torch.float64)
            for matrix in group:
                direction[space.slices[matrix.name].start + k] = math.sqrt(matrix.rank)
            directions.append(direction)
            radii.append(asked.rho / math.sqrt(len(group)))
    return torch.stack(directions), torch.tensor(radii, dtype=torch.float64)


def _losses(
    objective: Objective, probe: FusedProbe, batch: Mapping[str, Any], parts: Sequence[Tensor],
    factors: FixedFactors,
) -> Tensor:  # fmt: skip
    """Returns the losses of a batch's examples in all branches, (branches, B)."""
    found = []
    with objective.recurring(len(parts) > 1):
        for part in parts:
            # The centre takes the others' products, with c = 0, so that it is rounded as they are.
            branches = LowRank(part, factors, idle=False)
            with probe.held(branches):
                found.append(losses_of(objective, batch, len(branches)))
    return torch.cat(found)
