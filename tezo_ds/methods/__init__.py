"""The mathematics of an update. Nothing here knows of ranks, shards or models."""

from __future__ import annotations

from tezo_ds.config import TezoConfig
from tezo_ds.factors import CoefficientSpace
from tezo_ds.methods.tezo import Tezo, TezoMomentum

__all__ = ["Tezo", "TezoMomentum", "make_method"]


def make_method(config: TezoConfig, space: CoefficientSpace) -> Tezo:
    """The method that `config.method` names, at its start."""
    if config.method == "tezo-m":
        return TezoMomentum(space, config.momentum)
    return Tezo(space)
