"""What every way of sharding offers to the rest: forwards, scalars summed over ranks, shards to write."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tezo_ds.sharding.view import Block, ShardView, as_matrix

Thing = TypeVar("Thing")


class Sharding(ABC):
    """A model whose weights live somewhere. No subclass knows any mathematics.

    Attributes:
        module: the user's model, without wrappers; its names are the names used everywhere.
        device: where its forward runs.
        rank, world_size: of this process among those that see different data.
        everyone: ranks of the whole world, those that see the same data included.
        place: of this process among those.
        filled_apart: each rank filled its weights by itself, so they may differ from the start.
        quantised: why the weights cannot be written between forwards; None when they can.
    """

    module: nn.Module
    device: torch.device
    quantised: str | None = None
    filled_apart = False

    def __init__(self, module: nn.Module, group: dist.ProcessGroup | None) -> None:
        self.module = module
        self._group = group
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if distributed else 0
        self.world_size = dist.get_world_size(group) if distributed else 1
        self.everyone = dist.get_world_size() if distributed else 1
        self.place = dist.get_rank() if distributed else 0

    def forward(self, **inputs: Any) -> Any:
        """One forward of the model. Every rank must call it equally often, in the same order."""
        return self.module(**inputs)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place. The only communication of ours in a step."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def maxima(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over the whole world; as int64, 8 bytes each."""
        tensor = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        if self.everyone > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [int(number) for number in tensor.tolist()]

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the whole world, in place: each rank's part of a product with a sharded weight."""
        if self.everyone > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, thing: Thing) -> list[Thing]:
        """`thing` of each rank of the whole world, pickled; for what is rare."""
        things = [thing] * self.everyone
        if self.everyone > 1:
            dist.all_gather_object(things, thing)
        return things

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Global shape of a parameter."""
        return parameter.shape

    def compute_dtype(self, parameter: nn.Parameter) -> torch.dtype:
        """Of a parameter while a forward uses it."""
        return parameter.dtype

    def block(self, parameter: nn.Parameter) -> Block:
        """What of a parameter, seen as a matrix, this rank's forwards multiply with."""
        m, n = as_matrix(self.shape(parameter))
        return Block(range(m), range(n))

    def local(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's part of a layer's input and result where the layer's weight is a `block` of
        its matrix: y = x W[block]ᵀ holds for them, up to a sum over the ranks that share it."""
        return x, y

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
