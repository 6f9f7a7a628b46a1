"""Where weights live. `sharding_of` alone chooses the class."""

from __future__ import annotations

from typing import Any

from torch import nn

from tezo_ds.errors import ConfigError
from tezo_ds.sharding.base import Sharding
from tezo_ds.sharding.replicated import Replicated
from tezo_ds.sharding.view import ShardView

__all__ = ["Replicated", "ShardView", "Sharding", "sharding_of"]


def sharding_of(model: nn.Module, deepspeed_config: dict[str, Any] | None = None) -> Sharding:
    """The Sharding of a model.

    Args:
        model: a DeepSpeed engine, or a plain module: partitioned here if `deepspeed_config` has a
            `zero_optimization` block, replicated otherwise.
        deepspeed_config: a DeepSpeed config without our block.

    Raises:
        ConfigError: a stage other than 3; a module already partitioned by `zero.Init` without a
            config to run it by. ShardingError: an engine with an optimizer.
    """
    partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    wants_zero = "zero_optimization" in (deepspeed_config or {})
    if not (partitioned or wants_zero or hasattr(model, "zero_optimization_stage")):
        return Replicated(model)
    # Imported here, as it takes seconds and a replicated run has no use for it.
    from tezo_ds.sharding import zero3

    if hasattr(model, "zero_optimization_stage"):
        return zero3.Zero3(model)
    if not wants_zero:
        raise ConfigError(
            "the model's weights are partitioned (zero.Init) but there is no DeepSpeed config; "
            "pass a DeepSpeed engine, or a DeepSpeed JSON with zero_optimization and a tezo block"
        )
    return zero3.Zero3(zero3.wrap(model, deepspeed_config or {}))
