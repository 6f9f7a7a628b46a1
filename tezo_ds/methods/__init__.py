"""The mathematics of an update. Nothing here knows of ranks, models or torch.distributed."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.directions.rounding import Storing
from tezo_ds.directions.space import CoefficientSpace
from tezo_ds.methods.base import Method, Write
from tezo_ds.methods.descent import Adam, Descent, Momentum, Sgd
from tezo_ds.methods.lozo import Lozo, lefts
from tezo_ds.methods.mezo import Mezo
from tezo_ds.methods.tezo import Tezo
from tezo_ds.methods.tezo_adam import TezoAdam

__all__ = ["Method", "Write", "in_coefficients", "make_method"]


def in_coefficients(config: TezoConfig) -> bool:
    """Whether all that a run learns is its coefficients, those of ended periods included; otherwise it
    is in the weights, and can be had again from the slopes alone."""
    return config.method in ("tezo", "tezo-m", "tezo-adam-coef")


def make_method(config: TezoConfig, space: CoefficientSpace, device: torch.device) -> Method:
    """The method that `config.method` names, at its start; what of its state is as large as factors
    lies on `device`."""
    family, _, kind = config.method.partition("-")
    storing = Storing(config.seed, config.stochastic_rounding)
    descent = functools.partial(_descent, config, kind)
    coefficients = torch.zeros(space.numel, dtype=torch.float64)
    if family == "mezo":
        return Mezo(space, descent, storing)
    if family == "lozo":
        change = lefts(space, device)
        return Lozo(
            space, change, descent(change.data), descent(coefficients), config.nu,
            config.rank_scaling, storing,
        )  # fmt: skip
    rule = descent(coefficients)
    if kind == "adam":
        assert isinstance(rule, Adam)
        return TezoAdam(space, rule, config.refresh_every, storing)
    return Tezo(space, rule, config.refresh_every, storing)


def _descent(config: TezoConfig, kind: str, like: Tensor) -> Descent:
    if kind == "m":
        return Momentum(like, config.momentum)
    if kind.startswith("adam"):
        return Adam(like, config.betas, config.eps, config.bias_correction)
    return Sgd()
