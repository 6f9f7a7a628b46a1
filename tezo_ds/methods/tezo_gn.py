"""Gauss-Newton in the span of TeZO's directions: a step's weights are solved for, see `solving`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.directions.branches import Ask
from tezo_ds.directions.rounding import Storing
from tezo_ds.directions.space import CoefficientSpace, Packed
from tezo_ds.methods.base import Write
from tezo_ds.methods.descent import Sgd
from tezo_ds.methods.tezo import Tezo

RECALLED = -1  # number of the last step's direction, beside 0 … Q-1 of those that are drawn


class TezoGaussNewton(Tezo):
    """TeZO that also measures along the last step that moved, scaled to the length that τ has on average.

    Args:
        space: what trains.
        refresh_every: steps; 0: never.
        storing: how 16-bit weights are rounded.
        recalls: whether to measure along the last step.
        keep_periods: as of `Tezo`.
    """

    def __init__(
        self, space: CoefficientSpace, refresh_every: int, storing: Storing, recalls: bool,
        keep_periods: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(space, Sgd(), refresh_every, storing, keep_periods)
        self._recalls = recalls
        self._last = torch.zeros_like(self.coefficients)

    @property
    def state(self) -> dict[str, Packed]:
        return {**super().state, "last": self.space.pack(self._last)}

    @property
    def recalled(self) -> tuple[int, ...]:
        return (RECALLED,) if self._recalls and bool(self._last.any()) else ()

    def refresh(self) -> Write | None:
        self._last.zero_()  # of the old U and V
        return super().refresh()

    def offsets(self, ask: Ask) -> Tensor:
        drawn = tuple(q for q in ask.directions if q != RECALLED)
        rows = self.space.taus(ask.step, drawn).double()
        if RECALLED in ask.directions:  # which is asked for before all others
            rows = torch.cat([self._last[None], rows])
        return ask.times(rows)

    def total(self, step: int, weights: Tensor) -> Tensor:
        """Returns Σ weight · direction, float64 (D,), over the recalled direction, if there is one, and all
        that a step drew."""
        own = len(self.recalled)
        drawn = weights[own:]
        summed = self.space.weighted(step, drawn, range(len(drawn)))
        return self.space.unweighted(summed, drawn) + (weights[:own, None] * self._last).sum(dim=0)

    def update(self, step: int, slopes: Tensor, gradient: Tensor, lr: float) -> Write | None:
        if bool(gradient.any()):
            self._last.copy_(gradient * (math.sqrt(len(gradient)) / gradient.norm()))
        return super().update(step, slopes, gradient, lr)


def make(config: TezoConfig, space: CoefficientSpace, device: torch.device) -> TezoGaussNewton:
    """Makes the method from a config, at its start; the arguments are those of `make_method`."""
    return TezoGaussNewton(
        space, config.refresh_every, Storing.of(config), config.recalls, config.keep_periods
    )
