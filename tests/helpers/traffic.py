"""Traffic on the wire: every collective with its bytes and ranks, and the kernel's own count of bytes.

torch.distributed, DeepSpeed's wrapper around it, FSDP2 and DTensor all reach a process group through
operators of torch's dispatcher, where a `TorchDispatchMode` sees them. What bypasses the dispatcher
(the rendezvous store, a backend of DeepSpeed's own) shows in the bytes that the kernel counts on this
process's sockets.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Collective:
    """One collective call, as this rank sees it.

    Attributes:
        op: the operator, e.g. "_allgather_base_".
        ranks: members of its process group, numbered in the world.
        numel, nbytes: of the whole message, e.g. what an all-gather gathered; padding included.
    """

    op: str
    ranks: tuple[int, ...]
    numel: int
    nbytes: int

    @property
    def gathers(self) -> bool:
        """Whether the call is an all-gather of any kind."""
        return "allgather" in self.op.replace("all_gather", "allgather")


class Traffic(TorchDispatchMode):
    """A record of every collective that this process and thread begins inside its context."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if "c10d" in func.namespace:
            names = [argument.name for argument in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            group = given.get("process_group", given.get("group_name"))
            if group is not None:  # else it waits for one, or looks at a tensor
                messages = [*given.values(), result]
                numel = max(_total(message, torch.Tensor.numel) for message in messages)
                nbytes = max(_total(message, _nbytes) for message in messages)
                name = func._schema.name.split("::")[1]
                self.calls.append(Collective(name, _ranks(group), numel, nbytes))
        return result

    @property
    def gathered(self) -> int:
        """Elements that all all-gathers brought together."""
        return sum(call.numel for call in self.calls if call.gathers)

    def across(self, groups: Iterable[Iterable[int]]) -> list[tuple[str, int]]:
        """Returns the name and bytes of the calls between ranks of different groups."""
        insiders = [set(group) for group in groups]
        return [
            (call.op, call.nbytes)
            for call in self.calls
            if not any(set(call.ranks) <= group for group in insiders)
        ]


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _total(message: Any, size: Any) -> int:
    """Adds up a size over all tensors of an argument or result, however nested."""
    return sum(size(leaf) for leaf in tree_leaves(message) if isinstance(leaf, torch.Tensor))


def _ranks(group: Any) -> tuple[int, ...]:
    if isinstance(group, str):
        found = dist.distributed_c10d._resolve_process_group(group)
    else:
        found = dist.ProcessGroup.unbox(group)
    return tuple(dist.get_process_group_ranks(found))


SETTLED = 0.02  # seconds without a byte


class Wire:
    """Counts of the bytes that the kernel has sent over TCP from this rank to each other one of this machine.

    For gloo on Linux. Made by all ranks at once, when all connections that matter are up.
    """

    def __init__(self) -> None:
        ports: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(ports, [mine for mine, _ in _bytes_sent()])
        self._rank_at = {port: rank for rank, some in enumerate(ports) for port in some}

    def sent_during(self, call: Callable[[], object]) -> dict[int, int]:
        """Measures the bytes that `call` sends, by receiving rank; gloo's headers and a barrier included.

        All ranks call it at once.
        """
        dist.barrier()
        before = self._settled()
        call()
        dist.barrier()
        return {rank: count - before[rank] for rank, count in self._settled().items()}

    def _settled(self) -> Counter[int]:
        """Counts once nothing leaves any more: gloo's thread may send a barrier's last message behind it."""
        count, before = self._sent(), None
        while count != before:
            time.sleep(SETTLED)
            count, before = self._sent(), count
        return count

    def _sent(self) -> Counter[int]:
        total: Counter[int] = Counter()
        for (_, port), count in _bytes_sent().items():
            if port in self._rank_at:
                total[self._rank_at[port]] += count
        return total


def _bytes_sent() -> dict[tuple[int, int], int]:
    """Counts the bytes sent so far on each open TCP connection: (own port, port of the peer) -> bytes."""
    counts: dict[tuple[int, int], int] = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(fd))) as open_socket:
                if open_socket.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                pair = open_socket.getsockname()[1], open_socket.getpeername()[1]
                info = open_socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
        except OSError:  # it listens, or was closed meanwhile
            continue
        # tcpi_bytes_sent and tcpi_bytes_retrans: Linux 4.19 or newer
        sent, again = struct.unpack_from("QQ", info, 200)
        counts[pair] = sent - again
    return counts
