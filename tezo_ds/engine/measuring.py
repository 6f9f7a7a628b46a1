"""Losses of a step: the branches that this rank runs, the number of forwards, and sums over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tezo_ds.auto.radius import Radius, choose_rho
from tezo_ds.config import TezoConfig
from tezo_ds.directions.branches import Ask, Branches, kappas
from tezo_ds.engine.live_bytes import LiveBytes
from tezo_ds.engine.slopes import PATIENCE
from tezo_ds.engine.state import Cost, StepState
from tezo_ds.errors import ConfigError, ProbeError
from tezo_ds.losses.objective import Objective
from tezo_ds.methods import Method
from tezo_ds.per_example.losses import ExampleLosses
from tezo_ds.probes import Probe
from tezo_ds.rollouts.shaping import shaped
from tezo_ds.sharding import Sharding

# Losses below this are those of certain answers: the spacing of float32 logits near 20 is 2e-6.
CERTAIN = 1e-5


class Measuring:
    """Measurement of a method's branches by a probe.

    Attributes:
        groups: ranks that measure directions of their own; 1: all measure the same ones.
        radius: how ρ was chosen, where the config leaves that open.
        asked: whether this rank was asked to stop; told to the others with the next step's losses.

    Raises:
        ConfigError: a schedule lacks a number.
    """

    def __init__(
        self, config: TezoConfig, sharding: Sharding, method: Method, probe: Probe,
        objective: Objective, state: StepState, of_examples: ExampleLosses | None = None,
    ) -> None:  # fmt: skip
        config.queries_at(0)
        self._config, self._sharding = config, sharding
        self._method, self._probe, self._objective = method, probe, objective
        self._state, self._of_examples = state, of_examples
        # Listed once, as to walk through thousands takes longer than all else that a step does but forwards.
        self._modules = list(sharding.module.modules())
        self._where = f"{type(sharding).__name__} on {sharding.everyone} rank(s)"
        self.asked, self._certain = False, 0
        self.groups = sharding.world_size if config.placement == "per_rank" else 1
        self.radius: Radius | None = None

    def own(self, step: int) -> range:
        """Returns the directions that this rank measures; of examples' own those of the last step."""
        if self._of_examples is not None:
            return self._of_examples.own
        count = self._config.queries_at(step)
        group = self._sharding.rank if self.groups > 1 else 0
        return range(group * count, (group + 1) * count)

    def others(self, step: int) -> int:
        """Returns the number of directions that other ranks alone measure, the same on every rank."""
        if self._of_examples is not None:
            return self._of_examples.others
        return (self.groups - 1) * self._config.queries_at(step)

    def asks(self, step: int, directions: range, at_once: int) -> list[Ask]:
        """Returns all branches of what the method recalls and of some directions that are drawn, an item for
        each forward of `at_once`; 0: one forward."""
        several = (*self._method.recalled, *directions)
        return list(Ask.of(step, several, self._state.rho, self._central).parts(at_once))

    @property
    def _central(self) -> bool:
        return self._config.difference == "central"

    def _at_once(self, batch: Mapping[str, Any], step: int) -> int:
        """Returns the number of branches in one forward, the same on all ranks."""
        if self._config.memory_budget is None:
            return self._config.branch_chunk
        examples, length = _size(batch)
        if self._config.micro_batch:
            examples = min(examples, self._config.micro_batch)
        (tokens,) = self._sharding.maxima([examples * length])
        if self._state.cost is None or self._state.cost.where != self._where:
            self._state.cost = Cost(*self._measure_cost(batch, step, tokens), self._where)
        fixed, each = self._state.cost.fixed, self._state.cost.each
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
        """Returns bytes of tensors of a forward, whatever its branches, and bytes for each token of each
        branch: from the peaks of forwards of two and of four branches; the most of any rank."""
        if self._probe.writes:  # a branch a forward, and no move that leaves errors
            self._objective(batch, 1)
            with LiveBytes() as live:
                self._objective(batch, 1)
            (peak,) = self._sharding.maxima([live.peak])
            return 0.0, peak / tokens
        peaks = []
        for count in (2, 4):
            ask = Ask(step, self._state.rho, tuple((q, 1) for q in range(count)))
            self._sums(batch, self._method.branches(ask))  # so that nothing made once counts
            with LiveBytes() as live:
                self._sums(batch, self._method.branches(ask))
            peaks.append(live.peak)
        two, four = self._sharding.maxima(peaks)
        each = max(four - two, 1) / 2
        return max(two - 2 * each, 0.0), each / tokens

    def settle(self, batch: Mapping[str, Any], step: int) -> None:
        """Finds the model's trunk, if that is not done yet, by forwards of two examples."""
        self._sharding.module.eval()
        if self._probe.writes:
            self._objective.settle(batch, 1)
            return
        rho = 1e-3 if math.isnan(self._state.rho) else self._state.rho
        with self._probe.held(self._method.branches(Ask(step, rho, ((0, 1), (0, -1))))):
            self._objective.settle(batch, 2)

    def choose_rho(self, batch: Mapping[str, Any], step: int) -> None:
        """Sets ρ under `rho: auto`; weights and run are afterwards as before. The in-place probe takes a
        copy of the trained weights meanwhile, also where its steps need none.

        Raises:
            ProbeError: slopes are noise at every radius; no position carries a label.
        """
        self._state.rho = 1.0  # any number, to measure the memory of a forward
        # At most as many branches at once as a step has, so no more memory than a step takes.
        asked = len(self.asks(step, range(self._config.queries_at(step)), 0)[0])
        at_once = min(self._at_once(batch, step) or asked, asked)

        def losses(ask: Ask) -> Tensor:
            return self._over_ranks(self._ours(batch, ask.parts(at_once)), step)

        dtypes = self._sharding.floating_dtypes()
        coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        with self._probe.exactly():
            self.radius = choose_rho(losses, coarsest, self._central)
        self._state.rho = self.radius.rho

    def losses(self, batch: Mapping[str, Any], step: int) -> Tensor:
        """Returns the loss of each branch over the ranks that measured it: float64 (groups, branches) on
        the CPU; with directions of examples' own that of each. Sets `stopping`.

        Raises:
            ProbeError: no position carries a label.
        """
        self._objective.step = step
        at_once = self._at_once(batch, step)
        if self._of_examples is not None:
            return self._of_examples(batch, step, self._state.rho, at_once, self._told)
        own = self._ours(batch, self.asks(step, self.own(step), at_once))
        sums = own.new_zeros(len(own), self.groups, own.shape[1])
        sums[:, self._sharding.rank if self.groups > 1 else 0] = own
        return self._means(self._told(sums), step)

    def _told(self, sums: Tensor) -> Tensor:
        """All-reduces sums, float64, to the CPU, and with them the request to stop."""
        asked = self.asked  # a signal may set it at any time
        message = torch.cat([sums.flatten(), sums.new_tensor([asked])])
        message = self._sharding.all_reduce(message).cpu()
        self._state.stopping = bool(message[-1])
        if self._sharding.everyone > self._sharding.world_size:
            # Ranks that share examples by tensor parallelism reduced in groups of their own.
            self._state.stopping = bool(self._sharding.maxima([asked])[0])
        return message[:-1].view_as(sums)

    def loss(self, batch: Mapping[str, Any], step: int) -> float:
        """Returns the unperturbed loss over all ranks, whose examples may differ."""
        return self._over_ranks(self._sums(batch, self._method.kept_aside()), step).item()

    def losses_along(self, batch: Mapping[str, Any], step: int, changes: Tensor) -> Tensor:
        """Returns the loss over all ranks at a + each change, (k, D): float64 (k,) on the CPU."""
        return self._over_ranks(self._sums(batch, self._method.along(changes)), step)

    def kappas(self, losses: Tensor) -> Tensor:
        """Returns κ of all directions from `losses`: float64 (Q,) on the CPU, NaN for failed ones."""
        values = shaped(losses, self._config.shape, self._central)
        return kappas(values, self._state.rho, self._central).flatten()

    def _ours(self, batch: Mapping[str, Any], asks: Iterable[Ask]) -> Tensor:
        """Returns the objective's sums of this rank's batch at all asks: float64 (S, branches)."""
        asks = list(asks)
        with self._objective.recurring(len(asks) > 1 or self._probe.writes):
            return torch.cat([self._sums(batch, self._method.branches(ask)) for ask in asks], dim=1)

    def _sums(self, batch: Mapping[str, Any], branches: Branches) -> Tensor:
        """Returns the objective's sums of this rank's batch at some branches: float64 (S, branches)."""
        if any(m.training for m in self._modules):  # dropout differs by branch
            self._sharding.module.eval()
        return self._probe.measure(self._objective, batch, branches)

    def _over_ranks(self, sums: Tensor, step: int) -> Tensor:
        """All-reduces each rank's sums (S, …) and returns losses (…)."""
        return self._means(self._sharding.all_reduce(sums).cpu(), step)

    def _means(self, sums: Tensor, step: int) -> Tensor:
        """Returns losses (…) from all ranks' sums (S, …)."""
        if not bool(self._objective.counts_of(sums).all()):
            where = "any" if self.groups == 1 else "some"
            raise ProbeError(f"step {step}: {self._objective.empty.format(where)}")
        return self._objective.losses_of(sums)

    def count(self, kappa: Tensor) -> None:
        """Counts the steps in a row in which directions failed."""
        self._state.failed = self._state.failed + 1 if bool(kappa.isnan().any()) else 0

    def check(self, losses: Tensor, kappa: Tensor, step: int) -> None:
        """Refuses a step that measured nothing, or failed too often.

        Args:
            losses: result of `losses`.
            kappa: κ of all directions, NaN for those that failed.
            step: index of the step.

        Raises:
            ProbeError: no branch differs, of an objective that is not piecewise constant and a loss that is
                not about 0, or is in too many steps in a row; or directions failed in as many.
        """
        failed = bool(kappa.isnan().any())
        tied = not failed and not bool(kappa.any()) and not self._objective.piecewise_constant
        # A batch whose every answer is certain and right has a loss of 0, or nearly, along all directions.
        certain = tied and bool((losses.abs() < CERTAIN).all())
        self._certain = self._certain + 1 if certain else 0
        if tied and self._certain in (0, PATIENCE):
            raise ProbeError(
                f"step {step}: all {losses.numel()} branches give the same loss {losses[0, 0]:.6g}, so "
                "nothing was measured; raise rho, or check that the chosen parameters act on the loss"
            )
        self.count(kappa)
        if self._state.failed >= PATIENCE:
            odd = losses[~losses.isfinite()]
            raise ProbeError(
                f"step {step}: loss is {odd[0].item()} in {len(odd)} of {losses.numel()} branches, the "
                f"{PATIENCE}th step in a row with such; lower lr or rho, and check the data and the "
                "dtype"
            )


def _size(batch: Mapping[str, Any]) -> tuple[int, int]:
    """Returns examples and padded length of a batch, by its largest tensor of two dims or more."""
    tensors = [v for v in batch.values() if isinstance(v, Tensor) and v.dim() > 1]
    return max(((len(v), v.shape[1]) for v in tensors), key=math.prod, default=(1, 1))
