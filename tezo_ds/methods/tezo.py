"""TeZO (arXiv 2501.19057) in coefficient space: U and V never change, so W_t = W₀ + U diag(a_t) Vᵀ
and the whole state of a run is the vector a (and its momentum), float64 and equal on every rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tezo_ds.factors import CoefficientSpace


class Tezo:
    """a ← a - η g with g the mean over directions of κτ.

    Attributes:
        coefficients: a, float64 (D,) on the CPU.
    """

    def __init__(self, space: CoefficientSpace) -> None:
        self._space = space
        self.coefficients = torch.zeros(space.numel, dtype=torch.float64)

    @property
    def state(self) -> dict[str, Tensor]:
        """Every vector that the next step depends on, by name; float64 (D,)."""
        return {"coefficients": self.coefficients}

    def directions(self, step: int, count: int) -> Tensor:
        """τ of each direction of a step: float64 (Q, D)."""
        return self._space.taus(step, count).double()

    def update(self, kappa: Tensor, tau: Tensor, lr: float) -> None:
        """One step.

        Args:
            kappa: the slope κ = (L⁺ - L⁻) / 2ρ of each direction, float64 (Q,) on the CPU.
            tau: of `directions`, (Q, D).
            lr: η of this step.
        """
        self._descend(_gradient(kappa, tau), lr)

    def _descend(self, gradient: Tensor, lr: float) -> None:
        self.coefficients -= lr * gradient


class TezoMomentum(Tezo):
    """TeZO-m: m ← β₁m + (1-β₁)g, a ← a - η m."""

    def __init__(self, space: CoefficientSpace, momentum: float) -> None:
        super().__init__(space)
        self._beta1 = momentum
        self.momentum = torch.zeros_like(self.coefficients)

    @property
    def state(self) -> dict[str, Tensor]:
        """As in the base class."""
        return {**super().state, "momentum": self.momentum}

    def _descend(self, gradient: Tensor, lr: float) -> None:
        self.momentum.mul_(self._beta1).add_((1 - self._beta1) * gradient)
        self.coefficients -= lr * self.momentum


def _gradient(kappa: Tensor, tau: Tensor) -> Tensor:
    """Mean over directions of κτ: (D,)."""
    return (kappa[:, None] * tau).sum(dim=0) / len(kappa)
