"""TeZO (arXiv 2501.19057) in coefficient space: while U and V stay, W_t = W₀ + U diag(a_t) Vᵀ and the
whole state of a run is the vector a (and its moments), float64 and equal on every rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.directions.branches import AT_ONCE, Ask, LowRank, Spread
from tezo_ds.directions.lowrank import FixedFactors
from tezo_ds.directions.rounding import Storing
from tezo_ds.directions.space import CoefficientSpace, Packed
from tezo_ds.methods.base import Method, Write
from tezo_ds.methods.descent import Descent, descent_of


class Tezo(Method):
    """TeZO: a ← a - η · descent(g), g = Σ slope · τ, the mean over directions of κτ.

    Every `refresh_every` steps a goes into the weights, and U and V come from the next seed; moments,
    which belong to the old U and V, start anew. Vectors have neither, and go on.

    Args:
        space: what trains.
        descent: SGD (tezo), momentum (tezo-m) or Adam on the coefficients (tezo-adam-coef).
        refresh_every: steps; 0: never.
        storing: how 16-bit weights are rounded.
    """

    factors: FixedFactors

    def __init__(
        self, space: CoefficientSpace, descent: Descent, refresh_every: int, storing: Storing
    ) -> None:
        super().__init__(space)
        self.factors = FixedFactors(space)
        self.writes = refresh_every > 0
        self.descent, self._every, self._storing = descent, refresh_every, storing
        self._age = torch.zeros_like(self.coefficients)  # updates that the moments have seen

    @property
    def state(self) -> dict[str, Packed]:
        moments = {**self.descent.state, "age": self._age} if self.descent.state else {}
        return {**super().state, **{name: self.space.pack(t) for name, t in moments.items()}}

    def begin(self, step: int) -> Write | None:
        """Ends a period every `refresh_every` steps."""
        due = self._every and step and step % self._every == 0
        return self.refresh() if due else None

    def refresh(self) -> Write:
        """Ends a period: a goes into the weights, and U and V come from the next seed."""
        learnt = self.coefficients.clone()
        learnt[self.space.of_vectors] = 0
        ended = LowRank(learnt[None, None], FixedFactors(self.space, self.factors.period))
        store = self._storing.at("refresh", len(self.finished))
        self.finished.append(learnt)
        self.factors.advance()
        for tensor in (self.coefficients, self._age, *self.descent.state.values()):
            tensor[self.space.of_matrices] = 0
        return lambda view: ended.move_(view, None, 0, store)

    def branches(self, ask: Ask) -> LowRank:
        if len(ask) * self.space.numel > AT_ONCE:
            taus = self.space.taus(ask.step, ask.directions)
            return Spread(self.coefficients, ask, taus, self.factors)
        return self.along(self.offsets(ask))

    def along(self, changes: Tensor) -> LowRank:
        return LowRank((self.coefficients + changes)[:, None], self.factors)

    def kept_aside(self) -> LowRank:
        return LowRank(self.coefficients[None, None], self.factors)

    def update(self, step: int, slopes: Tensor, gradient: Tensor, lr: float) -> Write | None:
        self._age += 1
        self.coefficients -= lr * self.descent.step(gradient, self._age)
        return None


def make(config: TezoConfig, space: CoefficientSpace, device: torch.device) -> Tezo:
    """Makes TeZO from a config, at its start; the arguments are those of `make_method`."""
    descent = descent_of(config, torch.zeros(space.numel, dtype=torch.float64))
    return Tezo(space, descent, config.refresh_every, Storing.of(config))
