"""A sharding whose other ranks are not there, for a dry run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tezo_ds.engine.live_bytes import LiveBytes
from tezo_ds.sharding.base import Sharding
from tezo_ds.sharding.fsdp2 import Fsdp2

Thing = TypeVar("Thing")


class Collectives(TorchDispatchMode):
    """Bytes of each message of the collectives that begin within it: (whether it gathers, bytes)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[bool, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "c10d" in func.namespace and "wait" not in func._schema.name:
            given = (tree_leaves(each) for each in (*args, result))
            sizes = (sum(x.nbytes for x in each if isinstance(x, Tensor)) for each in given)
            name = func._schema.name.replace("all_gather", "allgather")
            self.calls.append(("allgather" in name, max(sizes)))
        return result


class Absent(Sharding):
    """Mixed into a sharding whose module's tensors have no values.

    Attributes:
        fake: the mode that they are of.
        live: counts its forwards' tensors.
        collectives: that its forwards and our own messages make.
    """

    fake: FakeTensorMode
    live: LiveBytes
    collectives: Collectives

    def watched(self, fake: FakeTensorMode, live: LiveBytes) -> None:
        """Sets all attributes; to be called before all else."""
        self.fake, self.live, self.collectives = fake, live, Collectives()

    def forward(self, **inputs: Any) -> Any:
        """Runs a forward; tensors made inside have no values either."""
        with self.fake, self.live, self.collectives:
            return super().forward(**inputs)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Returns made-up sums that differ, as losses do."""
        with self.collectives:
            super().all_reduce(tensor)
        numbers = torch.arange(1, tensor.numel() + 1, dtype=tensor.dtype)
        return numbers.view(tensor.shape)

    def maxima(self, numbers: Sequence[int]) -> list[int]:
        """Returns this rank's own numbers."""
        return list(numbers)

    def gather(self, thing: Thing) -> list[Thing]:
        """Returns this rank's own text; all ranks would say the same."""
        return [thing] * self.everyone


class AbsentFsdp2(Absent, Fsdp2):
    """Sharding of a module to which `fully_shard` was applied."""
