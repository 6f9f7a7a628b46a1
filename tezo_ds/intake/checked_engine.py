"""Engine over a sharded model, made with the checks that the Python API and the command line share."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from tezo_ds.config import TezoConfig
from tezo_ds.engine.engine import Engine
from tezo_ds.intake.neighbours import refuse_seen_neighbours
from tezo_ds.intake.own_loss import check_own_loss
from tezo_ds.intake.patterns import check_patterns
from tezo_ds.losses.objective import LossFn, Objective
from tezo_ds.rollouts.judged import Rewarded
from tezo_ds.sharding import Sharding


def checked_engine(
    sharding: Sharding,
    config: TezoConfig,
    loss_fn: LossFn | None = None,
    factors_dtype: torch.dtype | None = None,
    ranks: Mapping[str, int] | None = None,
    rewarded: Rewarded | None = None,
) -> Engine:
    """Returns an engine whose patterns match, and which compares a default loss at its first batch.

    Args:
        sharding, config, loss_fn, factors_dtype, ranks, rewarded: as for `Engine`.

    Raises:
        TezoError: one line that says what to change.
    """
    check_patterns(sharding, config)
    engine = Engine(sharding, config, loss_fn, factors_dtype, ranks, rewarded)
    if loss_fn is None and rewarded is None:
        engine.objective.first = functools.partial(_check_first, engine.objective)
    return engine


def _check_first(objective: Objective, batch: Mapping[str, Any]) -> None:
    refuse_seen_neighbours(objective, batch)
    check_own_loss(objective, batch)
