"""The mathematics of an update. Nothing here knows of ranks, models or torch.distributed."""

from __future__ import annotations

import torch

from tezo_ds.config import TezoConfig
from tezo_ds.config.registry import MethodFacts, register
from tezo_ds.directions.space import CoefficientSpace
from tezo_ds.methods.base import Method, Write

__all__ = ["Method", "MethodFacts", "Write", "make_method", "register"]


def make_method(config: TezoConfig, space: CoefficientSpace, device: torch.device) -> Method:
    """Makes the method that `config.method` names, at its start.

    Args:
        config: the run's config.
        space: all coefficients, D numbers.
        device: where state that is as large as factors lies; the coefficients are on the CPU.
    """
    method: Method = config.facts.load()(config, space, device)
    return method
