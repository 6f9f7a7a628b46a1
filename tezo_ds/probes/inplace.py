"""The general probe: write W₀ + U diag(c) Vᵀ into the local shards, one forward a branch, restore."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tezo_ds.errors import ShardingError
from tezo_ds.factors import CoefficientSpace
from tezo_ds.lowrank import ShardFactors, add_low_rank_
from tezo_ds.objective import Objective
from tezo_ds.sharding.base import Sharding
from tezo_ds.sharding.view import ShardKey, ShardView


class InplaceProbe:
    """Perturbs the shards themselves; 2Q gathers a step and a second copy of the trained shards.

    Every branch starts from the kept copy and ends by copying it back, so no error accumulates.

    Raises:
        ShardingError: weights are quantised on the way to the forward; the rounding would swamp ρ.
    """

    name = "inplace"

    def __init__(self, sharding: Sharding, space: CoefficientSpace) -> None:
        if sharding.quantised:
            raise ShardingError(
                f"inplace probe: {sharding.quantised} rounds weights by more than rho; "
                "turn it off, or use the fused probe"
            )
        self._sharding, self._space = sharding, space
        self._factors = ShardFactors(space, keep=True)
        self._originals: dict[ShardKey, Tensor] = {}

    def measure(self, objective: Objective, batch: Mapping[str, Any], c: Tensor) -> Tensor:
        """See `Probe`."""
        results = []
        for branch in c:
            with self.held(branch):
                results.append(objective(batch, 1))
        return torch.cat(results, dim=1)

    @contextmanager
    def held(self, c: Tensor) -> Iterator[None]:
        """See `Probe`. The weights are restored bit for bit, also after an error."""
        if not c.any():  # W₀ itself: nothing to write
            yield
            return
        parts = self._space.split(c)
        changed: set[ShardKey] = set()

        def perturb(view: ShardView) -> None:
            if view.key not in self._originals:
                self._originals[view.key] = torch.empty_like(view.local)
            self._originals[view.key].copy_(view.local)
            changed.add(view.key)
            add_low_rank_(view, *self._factors(view), parts[view.name])

        def restore(view: ShardView) -> None:
            if view.key in changed:
                view.local.copy_(self._originals[view.key])

        try:
            self._sharding.each_shard(parts.keys(), perturb)
            yield
        finally:
            self._sharding.each_shard(parts.keys(), restore)
