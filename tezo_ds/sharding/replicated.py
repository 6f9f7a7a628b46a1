"""Whole weights on every rank: one process, or data-parallel replicas."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tezo_ds.sharding.absent import absent_from
from tezo_ds.sharding.base import Sharding, named_state
from tezo_ds.sharding.view import ShardView, as_matrix


class Replicated(Sharding):
    """Whole weights on each rank; replicas stay equal because all make the same updates."""

    filled_apart = True
    runs_alone = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, group=None)
        self.absent, brought_to = absent_from(module)
        device = next(module.parameters()).device
        # A replay needs shapes alone; what else it computes is no part of the model.
        self.device = (brought_to or torch.device("cpu")) if device.type == "meta" else device

    def each_shard(self, names: Collection[str], write: Callable[[ShardView], None]) -> None:
        """Calls `write` on one view of each whole parameter; on a copy of a packed one, to be read alone."""
        for name, parameter in self.module.named_parameters():
            if name in names and name not in self.packed:
                write(ShardView(name, as_matrix(parameter.shape), 0, parameter.data.view(-1)))
        for name, weight in self.packed.items():
            if name in names:
                write(ShardView(name, as_matrix(weight.shape), 0, weight.dequantised().view(-1)))

    def full_tensors(self) -> Iterator[tuple[list[str], Tensor | None]]:
        """Yields copies of rank 0's own weights, packed ones unpacked, without communication."""
        for names, tensor in named_state(self.module, self.packed):
            if self.rank == 0 and names[0] in self.packed:
                tensor = self.packed[names[0]].dequantised()
            yield names, tensor.detach().cpu().clone() if self.rank == 0 else None


def sharding_of(model: nn.Module, config: Mapping[str, Any]) -> Replicated:
    """Returns the sharding of a model whose weights are whole on this rank."""
    return Replicated(model)


def alone(module: nn.Module) -> Replicated:
    """Returns the sharding of a process by itself, whatever its world: no other rank is involved."""
    sharding = Replicated(module)
    sharding.rank = sharding.place = 0
    sharding.world_size = sharding.everyone = 1
    return sharding
