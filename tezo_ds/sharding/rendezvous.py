"""Rendezvous of ranks that torchrun's agent has restarted."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist


def of_restart(timeout: timedelta) -> dict[str, Any]:
    """Returns arguments of `init_process_group` for ranks of a restart; none for a first start.

    The agent keeps one store for all its restarts, in which the ranks that are gone have left their
    addresses: the new ones would wait for those (pytorch issue 135712). So each restart has a part of
    the store to itself. Each agent numbers its own restarts: where agents come and go, set
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for them all, which makes a new store each time.
    """
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not count or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    part = dist.PrefixStore(f"restart {count}", store)
    return {"store": part, "rank": rank, "world_size": world_size}
