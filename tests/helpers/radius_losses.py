"""Losses as an engine would measure them, for `choose_rho`."""

from __future__ import annotations

import torch
from torch import Tensor

import tezo_ds
from tezo_ds.directions.branches import Ask, kappas
from tezo_ds.probes.inplace import InplaceProbe


class Losses:
    """Losses of a batch over all ranks, or with `own` of this rank alone; weights are restored exactly.

    Attributes:
        branches: how many were measured so far.
    """

    def __init__(self, engine: tezo_ds.Engine, batch: dict[str, Tensor], own: bool = False) -> None:
        self.engine, self.batch, self.own, self.branches = engine, batch, own, 0
        if isinstance(engine.probe, InplaceProbe):
            engine.probe.copies = True

    @torch.no_grad()
    def __call__(self, ask: Ask) -> Tensor:
        engine = self.engine
        self.branches += len(ask)
        branches = (engine.method.branches(part) for part in ask.parts(8))
        parts = [engine.probe.measure(engine.objective, self.batch, part) for part in branches]
        sums = torch.cat(parts, dim=1)
        loss_sum, count = (sums if self.own else engine.sharding.all_reduce(sums)).cpu()
        return loss_sum / count

    def kappa(self, directions: int, rho: float) -> Tensor:
        """Measures κ of the first directions of step 0: (directions,)."""
        return kappas(self(Ask.of(0, range(directions), rho))[None], rho, True)[0]
