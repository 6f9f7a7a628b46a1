"""The losses of a step: which branches this rank runs, in how many forwards, and what all ranks found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tezo_ds.branches import Ask, Branches
from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError, ProbeError
from tezo_ds.methods import Method
from tezo_ds.objective import Objective
from tezo_ds.probes import Probe
from tezo_ds.queries import queries_at
from tezo_ds.sharding import Sharding
from tezo_ds.slopes import PATIENCE


class Measuring:
    """Measures what a method asks for by a probe.

    Attributes:
        groups: ranks that measure directions of their own; 1: all measure the same ones.

    Raises:
        ConfigError: ranks cannot have directions of their own; a schedule lacks a number.
    """

    def __init__(
        self, config: TezoConfig, sharding: Sharding, method: Method, probe: Probe,
        objective: Objective,
    ) -> None:  # fmt: skip
        if config.placement == "per_rank" and probe.name != "fused":
            raise ConfigError(
                "placement per_rank needs the fused probe, as ranks share the weights; exclude what it "
                "cannot reach, or set placement to shared"
            )
        queries_at(config, 0)
        self._config, self._sharding = config, sharding
        self._method, self._probe, self._objective = method, probe, objective
        self._failed = 0  # steps in a row in which directions failed
        self.groups = sharding.world_size if config.placement == "per_rank" else 1

    def own(self, step: int) -> range:
        """The directions that this rank measures."""
        count = queries_at(self._config, step)
        group = self._sharding.rank if self.groups > 1 else 0
        return range(group * count, (group + 1) * count)

    def asks(self, step: int, directions: range) -> list[Ask]:
        """All branches of some directions, an item for each forward."""
        c = self._config
        whole = Ask.of(step, directions, c.rho, c.difference == "central")
        return list(whole.parts(c.branch_chunk))

    def losses(self, batch: Mapping[str, Any], step: int) -> Tensor:
        """Loss of each branch over the ranks that measured it: float64 (groups, branches) on the CPU.

        Raises:
            ProbeError: no position carries a label.
        """
        asks = self.asks(step, self.own(step))
        own = torch.cat([self._sums(batch, self._method.branches(ask)) for ask in asks], dim=1)
        sums = own.new_zeros(2, self.groups, own.shape[1])
        sums[:, self._sharding.rank if self.groups > 1 else 0] = own
        return self._over_ranks(sums, step)

    def loss(self, batch: Mapping[str, Any], step: int) -> float:
        """Unperturbed, over all ranks, whose examples may differ."""
        return self._over_ranks(self._sums(batch, self._method.kept_aside()), step).item()

    def _sums(self, batch: Mapping[str, Any], branches: Branches) -> Tensor:
        """Loss sums and counts of this rank's batch: float64 (2, branches)."""
        if any(m.training for m in self._sharding.module.modules()):  # dropout differs by branch
            self._sharding.module.eval()
        return self._probe.measure(self._objective, batch, branches)

    def _over_ranks(self, sums: Tensor, step: int) -> Tensor:
        """Losses (…) of sums and counts (2, …)."""
        loss_sum, count = self._sharding.all_reduce(sums).cpu()
        if not bool(count.all()):
            raise ProbeError(
                f"step {step}: no position of the batch carries a label on "
                f"{'any' if self.groups == 1 else 'some'} rank; check the labels (-100 means none) and "
                "the truncation length"
            )
        return loss_sum / count

    def check(self, losses: Tensor, kappa: Tensor, step: int) -> None:
        """Refuses what measured nothing.

        Args:
            losses: of `losses`.
            kappa: of all directions, NaN for those that failed.
            step: of both.

        Raises:
            ProbeError: no branch differs; or directions failed in too many steps in a row.
        """
        failed = bool(kappa.isnan().any())
        if not failed and not bool(kappa.any()):
            raise ProbeError(
                f"step {step}: all {losses.numel()} branches give the same loss {losses[0, 0]:.6g}, so "
                "nothing was measured; raise rho, or check that the chosen parameters act on the loss"
            )
        self._failed = self._failed + 1 if failed else 0
        if self._failed >= PATIENCE:
            odd = losses[~losses.isfinite()]
            raise ProbeError(
                f"step {step}: loss is {odd[0].item()} in {len(odd)} of {losses.numel()} branches, the "
                f"{PATIENCE}th step in a row with such; lower lr or rho, and check the data and the "
                "dtype"
            )
