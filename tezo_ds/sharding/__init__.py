"""Shardings: places where weights live. `sharding_of` chooses the class, by the table `SHARDINGS`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tezo_ds.errors import ConfigError
from tezo_ds.sharding.base import Sharding
from tezo_ds.sharding.replicated import Replicated
from tezo_ds.sharding.view import ShardView

__all__ = ["Replicated", "ShardView", "Sharding", "sharding_of"]

_WRAPPERS = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"}  # of torch
Takes = Callable[[nn.Module, Mapping[str, Any]], bool]


def _is_fsdp2(model: nn.Module, config: Mapping[str, Any]) -> bool:
    fully_sharded = any(hasattr(module, "reset_iter_state") for module in model.modules())
    return fully_sharded or any(hasattr(p, "device_mesh") for p in model.parameters())  # a DTensor


def _is_zero3(model: nn.Module, config: Mapping[str, Any]) -> bool:
    partitioned = any(hasattr(p, "ds_id") for p in model.parameters())
    return partitioned or "zero_optimization" in config or hasattr(model, "zero_optimization_stage")


# Which models each takes, and "module:function" that shards one (model, config); the first that takes a model
# has it. Modules are imported when they are needed, as that takes seconds.
SHARDINGS: tuple[tuple[Takes, str], ...] = (
    (_is_fsdp2, "tezo_ds.sharding.fsdp2:sharding_of"),
    (_is_zero3, "tezo_ds.sharding.zero3:sharding_of"),
    (lambda model, config: True, "tezo_ds.sharding.replicated:sharding_of"),
)


def sharding_of(model: nn.Module, deepspeed_config: dict[str, Any] | None = None) -> Sharding:
    """Returns the Sharding of a model.

    Args:
        model: a DeepSpeed engine; a module to which `fully_shard` was applied; or a plain module:
            partitioned here if `deepspeed_config` has a `zero_optimization` block, else replicated.
        deepspeed_config: a DeepSpeed config without our block.

    Raises:
        ConfigError: a wrapper of torch, a stage other than 3, or a module already partitioned by
            `zero.Init` without a DeepSpeed config. ShardingError: an engine with an optimizer;
            DTensors, or submodules under `fully_shard`, in a model that is not.
    """
    config = deepspeed_config or {}
    if found_in := _WRAPPERS & {type(module).__name__ for module in model.modules()}:
        raise ConfigError(
            f"the model is wrapped in {min(found_in)}; unwrap it (pass its .module), and shard it by "
            "fully_shard (FSDP2) in place of FullyShardedDataParallel"
        )
    module, _, function = next(made for takes, made in SHARDINGS if takes(model, config)).partition(
        ":"
    )
    found: Sharding = getattr(importlib.import_module(module), function)(model, config)
    return found
