"""Where weights live. `sharding_of` alone chooses the class."""

from __future__ import annotations

from typing import Any

from torch import nn

from tezo_ds.errors import ConfigError, ShardingError
from tezo_ds.sharding.base import Sharding
from tezo_ds.sharding.replicated import Replicated
from tezo_ds.sharding.view import ShardView

__all__ = ["Replicated", "ShardView", "Sharding", "sharding_of"]


def sharding_of(model: nn.Module, deepspeed_config: dict[str, Any] | None = None) -> Sharding:
    """The Sharding of a model.

    Args:
        model: a DeepSpeed engine; a module to which `fully_shard` was applied; or a plain module:
            partitioned here if `deepspeed_config` has a `zero_optimization` block, else replicated.
        deepspeed_config: a DeepSpeed config without our block.

    Raises:
        ConfigError: a stage other than 3; a module already partitioned by `zero.Init` without a
            config to run it by. ShardingError: an engine with an optimizer.
    """
    if any(hasattr(module, "reset_iter_state") for module in model.modules()):  # an FSDPModule
        from tezo_ds.sharding import fsdp2

        return fsdp2.Fsdp2(model)
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):  # a DTensor
        raise ShardingError(
            "the model's weights are DTensors but fully_shard was not applied; apply it on the data "
            "dim of the mesh, even if that has one rank"
        )
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
