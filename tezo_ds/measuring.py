"""The losses of a step: which branches this rank runs, in how many forwards, and what all ranks found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tezo_ds.branches import Ask, Branches
from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError, ProbeError
from tezo_ds.live_bytes import LiveBytes
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
        self._cost: tuple[float, float] | None = None  # bytes of a forward, and of a branch's token
        self._failed = 0  # steps in a row in which directions failed
        self.groups = sharding.world_size if config.placement == "per_rank" else 1

    def own(self, step: int) -> range:
        """The directions that this rank measures."""
        count = queries_at(self._config, step)
        group = self._sharding.rank if self.groups > 1 else 0
        return range(group * count, (group + 1) * count)

    def asks(self, step: int, directions: range, at_once: int) -> list[Ask]:
        """All branches of some directions, an item for each forward of so many; 0: one forward."""
        c = self._config
        return list(Ask.of(step, directions, c.rho, c.difference == "central").parts(at_once))

    def _at_once(self, batch: Mapping[str, Any], step: int) -> int:
        """Branches in one forward, the same on all ranks."""
        if self._config.memory_budget is None:
            return self._config.branch_chunk
        examples, length = _size(batch)
        if self._config.micro_batch:
            examples = min(examples, self._config.micro_batch)
        (tokens,) = self._sharding.maxima([examples * length])
        if self._cost is None:
            self._cost = self._measure_cost(batch, step, tokens)
        fixed, each = self._cost
        fits = (self._config.memory_budget * 2**30 - fixed) / (each * tokens)
        if fits < 1:
            raise ConfigError(
                f"memory_budget {self._config.memory_budget} GiB: one branch of {tokens} tokens takes "
                f"{(fixed + each * tokens) / 2**30:.3g} GiB; raise it, or lower micro_batch (or the "
                "batch size)"
            )
        return int(fits)

    def _measure_cost(
        self, batch: Mapping[str, Any], step: int, tokens: int
    ) -> tuple[float, float]:
        """Bytes of tensors of a forward, whatever its branches, and bytes for each token of each branch:
        from the peaks of forwards of two and of four branches; the most of any rank."""
        peaks = []
        for count in (2, 4):
            ask = Ask(step, self._config.rho, tuple((q, 1) for q in range(count)))
            self._sums(batch, self._method.branches(ask))  # what a first forward makes is made
            with LiveBytes() as live:
                self._sums(batch, self._method.branches(ask))
            peaks.append(live.peak)
        two, four = self._sharding.maxima(peaks)
        each = max(four - two, 1) / 2
        return max(two - 2 * each, 0.0), each / tokens

    def losses(self, batch: Mapping[str, Any], step: int) -> Tensor:
        """Loss of each branch over the ranks that measured it: float64 (groups, branches) on the CPU.

        Raises:
            ProbeError: no position carries a label.
        """
        asks = self.asks(step, self.own(step), self._at_once(batch, step))
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


def _size(batch: Mapping[str, Any]) -> tuple[int, int]:
    """Examples and padded length of a batch, by its largest tensor of two dims."""
    tensors = [v for v in batch.values() if isinstance(v, Tensor) and v.dim() > 1]
    return max(((len(v), v.shape[1]) for v in tensors), key=math.prod, default=(1, 1))
