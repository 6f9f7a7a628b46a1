"""A step that solves for the weights of its directions, in methods that do (`MethodFacts.solves`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.engine.measuring import Measuring
from tezo_ds.errors import ConfigError
from tezo_ds.losses.objective import Objective
from tezo_ds.methods.tezo_gn import TezoGaussNewton
from tezo_ds.output_layer.term import OutputTerm
from tezo_ds.sharding import Sharding
from tezo_ds.solving.gauss_newton import solve
from tezo_ds.solving.responses import LossResponses, Responses

# Where no scale lowers the loss: what the next are over, and how many times scales are tried in all.
SMALLER, TRIES = 8, 4


class Solving:
    """Gauss-Newton in the span of a step's directions, over all ranks.

    Where the label words have biases that were fitted, these are columns of the same solve: their
    responses need no forward, and the directions get no credit for what a bias does.
    """

    def __init__(
        self, config: TezoConfig, sharding: Sharding, method: TezoGaussNewton, measuring: Measuring,
        objective: Objective, term: OutputTerm,
    ) -> None:  # fmt: skip
        self._config, self._sharding, self._method = config, sharding, method
        self._measuring, self._objective, self._term = measuring, objective, term

    @property
    def _biases(self) -> int:
        """Number of biases that a step moves: those of the label words, in the order of the choices."""
        return 0 if self._objective.choices is None else self._term.biases

    def losses(self, batch: Mapping[str, Any], step: int) -> tuple[Tensor, Tensor]:
        """Returns the losses of a step's branches, float64 (1, branches), and the slopes to descend by, -s·w,
        float64 (Q,): of the recalled direction, if there is one, of all drawn ones, and of the biases; the
        same on every rank, by a message of Q² + Q + 1 numbers, and one of two a scale."""
        with self._objective.recurring(True):  # the forward of the scales is of the same batch
            return self._losses(batch, step)

    def _losses(self, batch: Mapping[str, Any], step: int) -> tuple[Tensor, Tensor]:
        (ask,) = self._measuring.asks(step, self._measuring.own(step), 0)
        found: Responses | LossResponses = LossResponses(ask.matrix())
        if self._objective.has_logits:
            found = Responses(ask.matrix(), self._biases)
        with self._objective.responding(found):
            losses = self._measuring.losses(batch, step)
        numbers = torch.cat([found.gram.flatten(), found.slope, found.positions[None]])
        total = self._sharding.all_reduce(numbers.to(self._sharding.device)).cpu()
        count = len(found.slope)
        gram, slope, positions = total[:-1][: count**2], total[count**2 : -1], total[-1].item()
        gram = gram.view(count, count)
        solved = solve(gram, slope, positions, self._config.damping, self._biases)
        return losses, -self._scale(batch, step, solved.weights) * solved.weights

    def _scale(self, batch: Mapping[str, Any], step: int, weights: Tensor) -> float:
        """Returns the scale of the step, 0 included, at which the batch's own loss is least.

        The loss of a model that is wrong and sure of it is steep and hardly curves, so that the solve asks
        for far too much. Where no scale lowers the loss smaller ones are tried, or it would stay there.
        """
        if not bool(weights.any()):
            return 0.0
        scales = torch.tensor([0.0, *self._config.step_scales], dtype=torch.float64)
        directions = len(weights) - self._biases
        change = self._method.total(step, weights[:directions])  # (D,)
        for _ in range(TRIES):
            with self._objective.leaning(scales[:, None] * weights[directions:]):
                losses = self._measuring.losses_along(batch, step, scales[:, None] * change)
            best = int(losses.nan_to_num(torch.inf, torch.inf, torch.inf).argmin())
            if best > 0:
                return scales[best].item()
            scales = scales / SMALLER
        return 0.0

    def parts(self, step: int, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """Returns Σ slope · direction, float64 (D,), of slopes as of `losses`, and those of biases: (C,), or
        (0,) where none move.

        Raises:
            ConfigError: there are more or fewer slopes than the step has columns.
        """
        drawn, recalled = self._config.queries_at(step), len(self._method.recalled)
        directions, biases = slopes[: recalled + drawn], slopes[recalled + drawn :]
        if len(directions) < recalled + drawn or len(biases) not in (0, self._term.biases):
            raise ConfigError(
                f"step {step}: {len(slopes)} numbers were solved for, and a step of this run has {recalled} "
                f"recalled and {drawn} drawn directions and {self._term.biases} biases; use the run's own "
                "config and files"
            )
        return self._method.total(step, directions), biases
