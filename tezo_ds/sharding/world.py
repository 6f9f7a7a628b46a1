"""The launcher's world as a rank sees it: joining it, and the device of the rank."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tezo_ds.errors import TezoError
from tezo_ds.launched import env_local_rank, env_world_size
from tezo_ds.sharding.rendezvous import of_restart


def join_world(deepspeed: bool, fsdp: bool, timeout: float) -> None:
    """Joins the ranks that a launcher started; ZeRO-3 and FSDP2 need a world, even if of one rank.

    Args:
        deepspeed, fsdp: what shards the weights.
        timeout: seconds that collectives wait for the slowest rank.
    """
    limit = timedelta(seconds=timeout)
    if deepspeed:
        from tezo_ds.sharding import zero3

        zero3.init_distributed(limit)
        return
    several = env_world_size() > 1
    if dist.is_initialized() or not (several or fsdp):
        return
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(env_local_rank())
    if several:
        dist.init_process_group(timeout=limit, **of_restart(limit))
    else:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)


def local_device() -> torch.device:
    """Returns this rank's accelerator, or the CPU where there is none."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, env_local_rank())


Thing = TypeVar("Thing")


def agreed(make: Callable[[], Thing]) -> Thing:
    """Returns rank 0's `make()` on every rank, or raises its TezoError there. All ranks must call it."""
    made: list[Any] = [None, None]
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    if alone or dist.get_rank() == 0:
        try:
            made[0] = make()
        except TezoError as error:
            made[1] = error
    if not alone:
        dist.broadcast_object_list(made)
    if made[1] is not None:
        raise made[1]
    thing: Thing = made[0]
    return thing
