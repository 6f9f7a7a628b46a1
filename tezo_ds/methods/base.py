"""What a method is to the rest: branches to measure, and an update from their slopes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from tezo_ds.branches import Branches
from tezo_ds.factors import CoefficientSpace, Packed
from tezo_ds.lowrank import Factors
from tezo_ds.sharding.view import ShardView

Write = Callable[[ShardView], None]  # changes a shard that this rank holds


class Method(ABC):
    """The mathematics of a run. Everything it knows is a function of the slopes so far, so it is the
    same on every rank.

    What a step changes is kept aside as coefficients, float64 and exact, where the method allows; the
    rest goes into the weights by a `Write`, which the caller applies to every shard.

    Attributes:
        coefficients: a, float64 (D,) on the CPU; zero where the weights hold the change.
        factors: of the low-rank family of its directions; None if they are dense.
        writes: whether a step may write weights.
    """

    factors: Factors | None = None
    writes = False

    def __init__(self, space: CoefficientSpace) -> None:
        self.space = space
        self.coefficients = torch.zeros(space.numel, dtype=torch.float64)

    @property
    def state(self) -> dict[str, Packed]:
        """Every number that the next step depends on and that is equal on all ranks, by name."""
        return {"coefficients": self.space.pack(self.coefficients)}

    def begin(self, step: int) -> Write | None:
        """To be called, and its result applied, before a step's branches are asked for."""
        return None

    @abstractmethod
    def branches(self, step: int, count: int, rho: float) -> Branches:
        """Δ = what is kept aside ± ρZ_q for each of `count` directions: +, -, +, …; 2Q in all."""

    @abstractmethod
    def kept_aside(self) -> Branches:
        """One branch: the change that is not in the weights."""

    @abstractmethod
    def update(self, step: int, kappa: Tensor, lr: float) -> Write | None:
        """One step.

        Args:
            step: whose directions were measured.
            kappa: the slope κ = (L⁺ - L⁻) / 2ρ of each direction, float64 (Q,) on the CPU.
            lr: η of this step.
        """

    def merged(self) -> None:
        """What was kept aside is in the weights now."""
        self.coefficients.zero_()

    def offsets(self, step: int, count: int, rho: float) -> Tensor:
        """±ρτ: float64 (2Q, D)."""
        tau = rho * self.space.taus(step, count).double()
        return torch.stack([tau, -tau], dim=1).flatten(0, 1)

    def gradient(self, step: int, kappa: Tensor) -> Tensor:
        """Mean over directions of κτ: float64 (D,)."""
        tau = self.space.taus(step, len(kappa)).double()
        return (kappa[:, None] * tau).sum(dim=0) / len(kappa)
