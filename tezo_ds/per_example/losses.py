"""Losses of a step in which each example has directions of its own.

Examples that carry a label are numbered over all ranks, rank after rank: 0 … R - 1. Example i measures
directions iQ … iQ + Q - 1, in its own rows of the forward that all examples share. The batch's loss is
L = Σ_i s_i / N, s_i the loss sum of example i and N the count of all, so with

    ℓ_i = s_i R / N        L is the mean of ℓ_i, and ∇L that of ∇ℓ_i
    κ_iq = (ℓ_i⁺ - ℓ_i⁻) / 2ρ      along τ_iq

the mean of κ_iq τ_iq over all R·Q directions has the expectation ∇L, as that of directions that all share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.directions.branches import Ask, LowRank
from tezo_ds.errors import ProbeError
from tezo_ds.methods import Method
from tezo_ds.per_example.objective import ExampleObjective, refuse_counted
from tezo_ds.per_example.probe import ExampleBranches, ExampleProbe
from tezo_ds.sharding import Sharding

Sign = tuple[int | None, int]


class ExampleLosses:
    """Measurement of each example's own directions.

    Attributes:
        own: directions that this rank measured in the last step.
        others: directions of other ranks, those of the rank with the most; equal on every rank.
    """

    def __init__(
        self, config: TezoConfig, sharding: Sharding, method: Method, probe: ExampleProbe,
        objective: ExampleObjective,
    ) -> None:  # fmt: skip
        self._config, self._sharding, self._method = config, sharding, method
        self._probe, self._objective = probe, objective
        self.own, self.others = range(0), 0

    def __call__(
        self, batch: Mapping[str, Any], step: int, rho: float, at_once: int, told: Callable[[Tensor], Tensor]
    ) -> Tensor:  # fmt: skip
        """Returns ℓ of each example in each branch, over all ranks: float64 (R, branches) on the CPU. All
        ranks must call it.

        Args:
            batch: this rank's examples; their number may differ from rank to rank.
            step: index of the step.
            rho: ρ.
            at_once: branches in one forward; 0: all.
            told: all-reduces a sum.

        Raises:
            ProbeError: no example carries a label.
        """
        carries = self._objective.carries(batch)
        queries, mine = self._config.queries_at(step), int(carries.sum())
        counts = torch.zeros(self._sharding.world_size, dtype=torch.int64)
        counts[self._sharding.rank] = mine
        by_rank = self._sharding.all_reduce(counts.to(self._sharding.device)).tolist()
        first, total = sum(by_rank[: self._sharding.rank]), sum(by_rank)
        self.own = range(first * queries, (first + mine) * queries)
        self.others = (total - min(by_rank)) * queries
        if not total:
            raise _no_label(step)
        pattern = Ask.of(step, range(queries), rho, self._config.difference == "central").signs
        ours = self._ours(batch, step, rho, carries, first, list(_cut(pattern, at_once)))
        sums = ours.new_zeros(2, total, len(pattern))
        sums[:, first : first + mine] = ours.transpose(1, 2)
        loss_sums, labels = told(sums)
        counted = [math.fsum(column) for column in labels.t().tolist()]  # N in each branch
        if 0.0 in counted:
            raise _no_label(step)
        return loss_sums * torch.tensor([total / n for n in counted], dtype=torch.float64)

    def _ours(
        self, batch: Mapping[str, Any], step: int, rho: float, carries: Tensor, first: int,
        chunks: list[tuple[Sign, ...]],
    ) -> Tensor:  # fmt: skip
        """Returns loss sums and counts of this rank's examples with labels: float64 (2, branches, own)."""
        parts = self._objective.parts(batch)
        numbers = iter(range(first, first + len(carries)))
        numbered = [next(numbers) if one else None for one in carries.tolist()]
        rows = [len(self._objective.carries(part)) for part in parts]
        numbered += [None] * (sum(rows) - len(numbered))  # of parts that fill up
        self._settle(batch, step, rho)
        by_chunk = []
        with self._objective.recurring(len(chunks) > 1):
            for chunk in chunks:
                found, start = [], 0
                for place, (part, count) in enumerate(zip(parts, rows, strict=True)):
                    ask = ask_of(
                        step,
                        rho,
                        chunk,
                        numbered[start : start + count],
                        self._config.queries_at(step),
                    )
                    found.append(self._measure(part, place, ask, len(chunk)))
                    start += count
                by_chunk.append(torch.cat(found, dim=2)[:, :, : len(carries)])
        sums = torch.cat(by_chunk, dim=1)
        refuse_counted(sums[1], carries)
        return sums[:, :, carries.to(sums.device)]

    def _settle(self, batch: Mapping[str, Any], step: int, rho: float) -> None:
        """Finds the model's trunk, if that is not done yet, by branches that examples share."""
        self._sharding.module.eval()  # dropout differs by branch
        trunk = self._objective.trunk
        if trunk is not None and not trunk.settled:
            with self._probe.held(self._method.branches(Ask(step, rho, ((0, 1), (0, -1))))):
                self._objective.settle(batch, 2)

    def _measure(self, part: Mapping[str, Any], place: int, ask: Ask, branches: int) -> Tensor:
        """Returns loss sums and counts of a part's examples: float64 (2, branches, examples)."""
        made = self._method.branches(ask)
        assert isinstance(made, LowRank), "the config's own check"
        each = partial(self._objective.each, part=place)
        changes = ExampleBranches(made, branches)
        return self._probe.measure(lambda batch, _: each(batch, branches), part, changes)


def ask_of(
    step: int, rho: float, chunk: tuple[Sign, ...], numbers: list[int | None], queries: int
) -> Ask:
    """Returns the changes of each example in each branch, branch-major.

    Args:
        step: index of the step.
        rho: ρ.
        chunk: direction below `queries` and sign of each branch.
        numbers: number of each example over all ranks; None: it stays where it is.
        queries: Q of each example.
    """
    signs = [
        (None, 0) if q is None or number is None else (number * queries + q, sign)
        for q, sign in chunk
        for number in numbers
    ]
    return Ask(step, rho, tuple(signs))


def _cut(pattern: tuple[Sign, ...], at_once: int) -> Iterator[tuple[Sign, ...]]:
    at_once = at_once or len(pattern)
    for start in range(0, len(pattern), at_once):
        yield pattern[start : start + at_once]


def _no_label(step: int) -> ProbeError:
    return ProbeError(
        f"step {step}: no position of the batch carries a label on any rank; check the labels (-100 means "
        "none) and the truncation length"
    )
