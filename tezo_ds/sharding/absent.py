"""Parameters without data: on the meta device, for good or between forwards by hooks of accelerate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tezo_ds.errors import ShardingError


def absent_from(module: nn.Module) -> tuple[str | None, torch.device | None]:
    """Returns why some parameter has no data (None: all have), and the device to which an offloading hook
    of accelerate brings it for each forward (None: nothing does)."""
    hooks = {
        id(p): hook for part in module.modules() for hook in _offloading(part)
        for p in part.parameters(recurse=hook.place_submodules)
    }  # fmt: skip
    found: tuple[str | None, torch.device | None] = None, None
    for name, p in module.named_parameters():
        if p.device.type != "meta" or hasattr(p, "ds_id"):  # ZeRO-3's shards are elsewhere
            continue
        hook = hooks.get(id(p))
        if hook is None or hasattr(p, "device_mesh"):
            return f"{name} has no data (it is on the meta device)", None
        why = f"{name} is kept out of the model between forwards by accelerate's {type(hook).__name__}"
        found = found if found[0] else (why, torch.device(hook.execution_device))
    return found


def refuse_absent(absent: str | None, what: str) -> None:
    """Raises ShardingError over `absent`, as of `absent_from`, unless it is None."""
    if absent is not None:
        raise ShardingError(
            f"{what}: {absent}; load the model without device_map, or shard it by ZeRO-3 or FSDP2"
        )


def _offloading(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [h for h in getattr(hook, "hooks", [hook]) if getattr(h, "offload", False)]
