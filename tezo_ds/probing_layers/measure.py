"""Slopes and bends of every example's loss along columns of each matrix, from forwards alone.

Along a unit vector e_k of a matrix's coefficients, with the others left as they are,

    slope_ik = (l_i(+ρ) - l_i(-ρ)) / 2ρ             the k-th coefficient of example i's gradient
    bend_ik  = (l_i(+ρ) + l_i(-ρ) - 2 l_i(0)) / ρ²   the k-th diagonal element of its Hessian

Unit vectors, because r of them give gradient and trace exactly, where r random τ that all examples share
leave a relative error of √(2/r) in both at the same number of forwards. Fewer than r columns, scaled by r over
their number, estimate the same sums, since the columns of U and V are drawn alike.

The radius of a unit vector is ρ√r, as long as the part of ρτ that a matrix of rank r gets in a step.

A block's matrices go together: what comes before the block runs once an example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tezo_ds.directions.branches import LowRank
from tezo_ds.directions.lowrank import FixedFactors
from tezo_ds.directions.space import CoefficientSpace, Matrix
from tezo_ds.errors import ProbeError
from tezo_ds.losses.objective import Objective
from tezo_ds.patterns import numbered_module
from tezo_ds.probes import listed
from tezo_ds.probes.fused import FusedProbe
from tezo_ds.probing_layers.losses import labelled_rows, losses_of
from tezo_ds.sharding.base import Sharding
from tezo_ds.trunk.trunk import Trunk

Batch = tuple[
    Mapping[str, Any], int
]  # this rank's examples, and the place of the first among all n


@dataclass(frozen=True)
class Asked:
    """What to measure.

    Attributes:
        matrices: matrices, in the model's order.
        seed: the run's seed, of U and V.
        batches: this rank's batches, as many on every rank; one without labels where its examples have run
            out.
        examples: n, examples over all ranks.
        columns: columns of each matrix to measure along, at most its rank.
        rho: ρ, of N(0, 1) directions.
        at_once: branches in one forward, at least 1.
        trunk: whether to run what comes before a block once for all branches.
    """

    matrices: Sequence[Matrix]
    seed: int
    batches: Sequence[Batch]
    examples: int
    columns: int
    rho: float
    at_once: int
    trunk: bool = True

    @property
    def branches(self) -> int:
        """Branches of each example, the centre of each block included."""
        count = sum(2 * min(self.columns, matrix.rank) for matrix in self.matrices)
        return count + len(list(blocks(self.matrices)))


@dataclass(frozen=True)
class Measured:
    """What was measured of one matrix: float64 (n, columns) each, scaled so that the mean over the n examples
    is the derivative of the mean loss."""

    matrix: Matrix
    slopes: Tensor
    bends: Tensor


def blocks(matrices: Sequence[Matrix]) -> Iterator[list[Matrix]]:
    """Yields matrices of one block together: of one outermost numbered module; others one at a time."""
    for _, group in groupby(matrices, key=lambda m: numbered_module(m.name) or m.name):
        yield list(group)


def measure(
    sharding: Sharding, objective: Objective, asked: Asked,
    progress: Callable[[float], None] | None = None,
) -> list[Measured]:  # fmt: skip
    """Measures each matrix; the same result on every rank. All ranks of the world must call it.

    Sends 16 n bytes for each column of a block in one message, and n numbers once.

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
        for group in blocks(asked.matrices):
            found += _block(sharding, objective, asked, group, scale)
            if progress is not None:
                progress(len(found) / len(asked.matrices))
    if not any(bool(one.slopes.any()) for one in found):
        raise ProbeError(
            f"no loss differs at ρ {asked.rho:g} along {found[0].matrix.name} or any other matrix; raise rho, or "
            "check that they take part in the forward"
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


def _block(
    sharding: Sharding, objective: Objective, asked: Asked, group: list[Matrix], scale: Tensor
) -> list[Measured]:
    space = CoefficientSpace(group, asked.seed)
    factors = FixedFactors(space)
    probe = FusedProbe(sharding, factors)
    widths = [min(asked.columns, matrix.rank) for matrix in group]
    columns = [
        space.slices[matrix.name].start + k
        for matrix, width in zip(group, widths, strict=True)
        for k in range(width)
    ]
    radii = torch.tensor([asked.rho * matrix.rank**0.5 for matrix in group], dtype=torch.float64)
    radii = radii.repeat_interleave(torch.tensor(widths))  # (columns,)
    c = torch.zeros(2 * len(columns) + 1, 1, space.numel, dtype=torch.float64)
    for place, column in enumerate(columns):
        c[2 * place, 0, column], c[2 * place + 1, 0, column] = radii[place], -radii[place]
    probe.trunk = objective.trunk = Trunk(sharding, space.slices, False) if asked.trunk else None
    pairs = LowRank(c[:2], factors)
    with probe.held(pairs):
        objective.settle(asked.batches[0][0], len(pairs))
    sums = torch.zeros(2, asked.examples, len(columns), dtype=torch.float64)
    for batch, first in asked.batches:
        losses = _losses(objective, probe, batch, c.split(asked.at_once), factors)
        plus, minus, centre = losses[:-1:2], losses[1:-1:2], losses[-1]  # (columns, B), (B,)
        both = torch.stack([plus - minus, plus + minus - 2 * centre])  # (2, columns, B)
        if len(labelled_rows(objective, batch)):  # and not a filler where examples have run out
            sums[:, first : first + both.shape[2]] = both.transpose(1, 2)
    sums = sharding.all_reduce(sums.to(sharding.device)).cpu() * scale
    slopes, bends = sums[0] / (2 * radii), sums[1] / radii**2
    parts = zip(group, slopes.split(widths, 1), bends.split(widths, 1), strict=True)
    return [Measured(*part) for part in parts]


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
