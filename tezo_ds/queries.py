"""How many directions a step measures: few while the loss is steep, more as it flattens."""

from __future__ import annotations

import math

from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError


def queries_at(config: TezoConfig, step: int) -> int:
    """Q of `step` (from 0), which all of an epoch's steps share.

    constant   `queries`.
    adaptive   TT-ZO: e^α at the start of epoch e (from 0), α = ln M / ln K, with M = `queries_max` and
               K = `total_steps`; rounded, at least 1. So M would be reached if an epoch were one step.
    adazeta    AdaZeta: min(max(⌊α e^β⌋, 1), M) with e from 1, α = `query_alpha`, β = `query_beta`.

    Args:
        config: whose total_steps and steps_per_epoch are set where the schedule needs them.
        step: from 0.

    Raises:
        ConfigError: steps_per_epoch is not set.
    """
    if config.query_schedule == "constant":
        return config.queries
    if config.steps_per_epoch is None:
        raise ConfigError(
            f"query_schedule {config.query_schedule} needs steps_per_epoch: examples over batch size"
        )
    assert config.queries_max is not None, "the config's own check"
    epoch = step // config.steps_per_epoch
    if config.query_schedule == "adaptive":
        assert config.total_steps is not None, "the config's own check"
        alpha = math.log(config.queries_max) / math.log(max(2, config.total_steps))
        return min(max(round(epoch**alpha), 1), config.queries_max)
    try:
        wanted = math.floor(config.query_alpha * (epoch + 1) ** config.query_beta)
    except OverflowError:  # more than float64 has, so more than any M
        return config.queries_max
    return min(max(wanted, 1), config.queries_max)
