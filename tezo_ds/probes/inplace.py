"""The general probe: write each branch's change into the local shards, one forward a branch, restore."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.directions.branches import Branches
from tezo_ds.directions.lowrank import Factors
from tezo_ds.errors import ShardingError
from tezo_ds.probes.base import Losses, Probe
from tezo_ds.sharding.base import Sharding
from tezo_ds.sharding.view import ShardKey, ShardView


class InplaceProbe(Probe):
    """Probe that perturbs the shards in place: 2Q gathers a step.

    With `copies` every branch starts from a kept copy of the trained shards and ends by copying it
    back, so no error accumulates. Without, a branch is reached from the one before and the last one
    subtracted, as MeZO does: no second copy, but each step leaves rounding errors in the weights.

    Raises:
        ShardingError: weights are quantised on the way to the forward; the rounding would swamp ρ.
    """

    name = "inplace"
    writes = True

    def __init__(self, sharding: Sharding, names: Collection[str], copies: bool) -> None:
        if sharding.quantised:
            raise ShardingError(
                f"inplace probe: weights are quantised ({sharding.quantised}), which rounds them by more "
                "than rho; use the fused probe, or turn that off"
            )
        self._sharding, self._names, self.copies = sharding, names, copies
        self._originals: dict[ShardKey, Tensor] = {}

    @classmethod
    def gaps(
        cls, sharding: Sharding, names: Collection[str], factors: Factors | None
    ) -> dict[str, str]:
        held = {name for name, _ in sharding.module.named_parameters()}
        return {name: "parameter of an adapter" for name in names if name not in held}

    @classmethod
    def make(
        cls, config: TezoConfig, sharding: Sharding, names: Collection[str], factors: Factors | None
    ) -> InplaceProbe:
        if factors is not None:
            factors.keep = True
        return cls(sharding, names, keeps_copies(config, factors))

    def measure(self, objective: Losses, batch: Mapping[str, Any], branches: Branches) -> Tensor:
        if branches.idle:
            return objective(batch, len(branches))
        results = []
        with self._moving(branches) as move_to:
            for branch in range(len(branches)):
                move_to(branch)
                results.append(objective(batch, 1))
        return torch.cat(results, dim=1)

    @contextmanager
    def held(self, branches: Branches) -> Iterator[None]:
        """Context manager: forwards inside see the only branch; weights are restored also after an error."""
        with self._moving(branches) as move_to:
            if not branches.idle:
                move_to(0)
            yield

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Context manager: weights inside are restored from copies, which are freed after if not kept."""
        kept, self.copies = self.copies, True
        try:
            yield
        finally:
            self.copies = kept
            if not kept:
                self._originals.clear()

    def retrace(self, branches: Branches) -> None:
        """Moves through the branches as `measure` does, without forwards: with `restore: subtract` the
        weights get the same rounding errors, with copies nothing is done."""
        if self.copies or branches.idle:
            return
        with self._moving(branches) as move_to:
            for branch in range(len(branches)):
                move_to(branch)

    @contextmanager
    def _moving(self, branches: Branches) -> Iterator[Callable[[int], None]]:
        """Context manager: a function that moves the weights to a branch; restores them at the end."""
        at: dict[ShardKey, int] = {}  # where each shard is, if not at its own weights

        def move(view: ShardView, goal: int | None) -> None:
            key, start = view.key, at.pop(view.key, None)
            if self.copies and start is not None:
                view.local.copy_(self._originals[key])
                start = None
            elif self.copies and goal is not None:
                if key not in self._originals:
                    self._originals[key] = torch.empty_like(view.local)
                self._originals[key].copy_(view.local)
            if goal is not None:
                at[key] = goal
            if start is not None or goal is not None:
                branches.move_(view, start, goal)

        def move_to(goal: int | None) -> None:
            self._sharding.each_shard(self._names, lambda view: move(view, goal))

        try:
            yield move_to
        finally:
            move_to(None)


def keeps_copies(config: TezoConfig, factors: Factors | None) -> bool:
    """Returns whether trained weights are restored from copies, by `config.restore`."""
    return factors is not None if config.restore == "auto" else config.restore == "copy"
