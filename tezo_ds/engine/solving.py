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
from tezo_ds.methods.tezo import Tezo
from tezo_ds.sharding import Sharding
from tezo_ds.solving.gauss_newton import solve
from tezo_ds.solving.responses import Responses


class Solving:
    """Gauss-Newton in the span of a step's directions, over all ranks.

    Raises:
        ConfigError: the losses are a `loss_fn`'s, which shows no logits.
    """

    def __init__(
        self, config: TezoConfig, sharding: Sharding, method: Tezo, measuring: Measuring,
        objective: Objective,
    ) -> None:  # fmt: skip
        if not objective.has_logits:
            raise ConfigError(
                f"method {config.method} solves by the changes of logits, which a loss_fn does not show; "
                "leave loss_fn out, or choose another method"
            )
        self._config, self._sharding, self._method = config, sharding, method
        self._measuring, self._objective = measuring, objective

    def losses(self, batch: Mapping[str, Any], step: int) -> tuple[Tensor, Tensor]:
        """Returns the losses of a step's branches, float64 (1, branches), and the slopes to descend by, -s·w,
        float64 (Q,), the same on every rank: by a message of Q² + Q + 1 numbers, and one of two a scale."""
        with self._objective.recurring(True):  # the forward of the scales is of the same batch
            return self._losses(batch, step)

    def _losses(self, batch: Mapping[str, Any], step: int) -> tuple[Tensor, Tensor]:
        (ask,) = self._measuring.asks(step, self._measuring.own(step), 0)
        found = Responses(ask.matrix())
        with self._objective.responding(found):
            losses = self._measuring.losses(batch, step)
        count = len(ask.directions)
        numbers = torch.cat([found.gram.flatten(), found.slope, found.positions[None]])
        total = self._sharding.all_reduce(numbers.to(self._sharding.device)).cpu()
        gram, slope, positions = total[:-1][: count**2], total[count**2 : -1], total[-1].item()
        solved = solve(gram.view(count, count), slope, positions, self._config.damping)
        return losses, -self._scale(batch, step, solved.weights) * solved.weights

    def _scale(self, batch: Mapping[str, Any], step: int, weights: Tensor) -> float:
        """Returns the scale of the step, 0 included, at which the batch's own loss is least."""
        if not bool(weights.any()):
            return 0.0
        space, every = self._method.space, range(len(weights))
        change = space.unweighted(space.weighted(step, weights, every), weights)  # (D,)
        scales = torch.tensor([0.0, *self._config.step_scales], dtype=torch.float64)
        losses = self._measuring.losses_along(batch, step, scales[:, None] * change)
        losses = losses.nan_to_num(torch.inf, torch.inf, torch.inf)
        return scales[losses.argmin()].item()
