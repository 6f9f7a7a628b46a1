"""TeZO (arXiv 2501.19057) in coefficient space: while U and V stay, W_t = W₀ + U diag(a_t) Vᵀ and the
whole state of a run is the vector a (and its moments), float64 and equal on every rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.directions.branches import AT_ONCE, Ask, LowRank, Spread
from tezo_ds.directions.lowrank import FixedFactors
from tezo_ds.directions.periods import PeriodFactors
from tezo_ds.directions.rounding import Storing
from tezo_ds.directions.space import CoefficientSpace, Packed
from tezo_ds.errors import ConfigError
from tezo_ds.methods.base import Method, Write
from tezo_ds.methods.descent import Descent, descent_of


class Tezo(Method):
    """TeZO: a ← a - η · descent(g), g = Σ slope · τ, the mean over directions of κτ.

    Every `refresh_every` steps a goes into the weights, and U and V come from the next seed; moments,
    which belong to the old U and V, start anew. Vectors have neither, and go on. With `keep_periods` a
    stays beside the weights instead, and no weight is written:

        W_t = W₀ + Σ_p U_p diag(a_p) V_pᵀ

    Args:
        space: what trains.
        descent: SGD (tezo), momentum (tezo-m) or Adam on the coefficients (tezo-adam-coef).
        refresh_every: steps; 0: never.
        storing: how 16-bit weights are rounded.
        keep_periods: ended periods that stay low-rank terms; 0: they are written.
    """

    factors: FixedFactors

    def __init__(
        self, space: CoefficientSpace, descent: Descent, refresh_every: int, storing: Storing,
        keep_periods: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(space)
        self._beside = PeriodFactors(space, keep_periods + 1) if keep_periods else None
        self.factors = self._beside or FixedFactors(space)
        self.writes = refresh_every > 0 and not keep_periods
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

    def refresh(self) -> Write | None:
        """Ends a period: a goes into the weights, or stays beside them, and U and V come from the next seed.

        Raises:
            ConfigError: as many periods have ended as stay.
        """
        if self._beside is not None and len(self.finished) + 1 >= self._beside.count:
            kept = self._beside.count - 1
            raise ConfigError(
                f"keep_periods: {kept} have ended, and steps go on; raise keep_periods, or "
                "refresh_every, or leave keep_periods out, which writes them into the weights"
            )
        learnt = self.coefficients.clone()
        learnt[self.space.of_vectors] = 0
        ended = LowRank(learnt[None, None], FixedFactors(self.space, self.factors.period))
        store = self._storing.at("refresh", len(self.finished))
        self.finished.append(learnt)
        self.factors.advance()
        for tensor in (self.coefficients, self._age, *self.descent.state.values()):
            tensor[self.space.of_matrices] = 0
        if self._beside is not None:
            return None
        return lambda view: ended.move_(view, None, 0, store)

    def branches(self, ask: Ask) -> LowRank:
        if self._beside is None and len(ask) * self.space.numel > AT_ONCE:
            taus = self.space.taus(ask.step, ask.directions)
            return Spread(self.coefficients, ask, taus, self.factors)
        return self.along(self.offsets(ask))

    def along(self, changes: Tensor) -> LowRank:
        return self._at(self.coefficients + changes)

    def kept_aside(self) -> LowRank:
        return self._at(self.coefficients[None])

    def _at(self, a: Tensor) -> LowRank:
        """Returns branches of some coefficients of the running period, (branches, D)."""
        c = a if self._beside is None else self._beside.placed(a, self.finished)
        return LowRank(c[:, None], self.factors)

    def merged(self) -> None:
        super().merged()
        if self._beside is not None:
            for learnt in self.finished:
                learnt.zero_()

    def update(self, step: int, slopes: Tensor, gradient: Tensor, lr: float) -> Write | None:
        self._age += 1
        self.coefficients -= lr * self.descent.step(gradient, self._age)
        return None


def make(config: TezoConfig, space: CoefficientSpace, device: torch.device) -> Tezo:
    """Makes TeZO from a config, at its start; the arguments are those of `make_method`."""
    descent = descent_of(config, torch.zeros(space.numel, dtype=torch.float64))
    return Tezo(space, descent, config.refresh_every, Storing.of(config), config.keep_periods)
