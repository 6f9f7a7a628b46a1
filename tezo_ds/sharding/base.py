"""What every way of sharding offers to the rest: forwards, scalars summed over ranks, shards to write."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tezo_ds.sharding.view import ShardView


class Sharding(ABC):
    """A model whose weights live somewhere. No subclass knows any mathematics.

    Attributes:
        module: the user's model, without wrappers; its names are the names used everywhere.
        device: where its forward runs.
        rank, world_size: of this process among those that see different data.
        quantised: why the weights cannot be written between forwards; None when they can.
    """

    module: nn.Module
    device: torch.device
    quantised: str | None = None

    def __init__(self, module: nn.Module, group: dist.ProcessGroup | None) -> None:
        self.module = module
        self._group = group
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if distributed else 0
        self.world_size = dist.get_world_size(group) if distributed else 1

    def forward(self, **inputs: Any) -> Any:
        """One forward of the model. Every rank must call it equally often, in the same order."""
        return self.module(**inputs)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place. The only communication of ours in a step."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Global shape of a parameter."""
        return parameter.shape

    @abstractmethod
    def each_shard(self, names: Collection[str], write: Callable[[ShardView], None]) -> None:
        """Calls `write` on each shard this rank holds of the named parameters, and makes sure that
        the next forward sees what was written. Always visits the same shards in the same order."""

    @abstractmethod
    def full_tensors(self) -> Iterator[tuple[list[str], Tensor | None]]:
        """Every entry of the model's state_dict, one at a time: all its names (tied weights have
        several) and a full CPU copy on rank 0, None elsewhere. All ranks must run it to its end."""


def named_state(module: nn.Module) -> list[tuple[list[str], Tensor]]:
    """The state_dict's tensors in its order, each once, with all the names it goes by."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    return [(names[key], tensors[key]) for key in names]
