"""Base of all shardings: forwards, scalars summed over ranks, shards to write."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tezo_ds.quantised.packed import PackedWeight, packed_weights
from tezo_ds.sharding.view import Block, ShardView, as_matrix

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Weight:
    """A parameter as forwards see it.

    Attributes:
        name: the model's own name; of a packed weight that of the matrix that it stands for.
        shape: global shape, of a packed weight that of the matrix.
        dtype: dtype in a forward; of a packed weight that of the activations around it.
        may_train: whether it is not frozen by `requires_grad`, which packed weights cannot have.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    may_train: bool


class Sharding(ABC):
    """A model, and the place where its weights live. No subclass knows any mathematics.

    Attributes:
        module: the user's model, without wrappers; its names are the names used everywhere.
        device: where forwards run.
        rank, world_size: this process's rank, and the world size, among ranks that see different data.
        everyone: size of the whole world, ranks that see the same data included.
        place: this process's rank in the whole world.
        filled_apart: each rank filled its weights by itself, so replicas may differ from the start.
        quantised: why the weights cannot be written between forwards; None when they can.
        uncompiled: why a compiler cannot trace forwards; None when it can.
        absent: why they can be neither written nor read between forwards; see `absent_from`.
        packed: weights that are stored in fewer bits, by name.
        runs_alone: whether a layer can be called by itself, as all of its weights are here.
    """

    module: nn.Module
    device: torch.device
    quantised: str | None = None
    uncompiled: str | None = None
    absent: str | None = None
    filled_apart = False
    runs_alone = False

    def __init__(self, module: nn.Module, group: dist.ProcessGroup | None) -> None:
        self.module = module
        self.packed = packed_weights(module)
        if self.packed:
            name, weight = next(iter(self.packed.items()))
            self.quantised = f"{len(self.packed)} as {weight.kind}, e.g. {name}"
            self.uncompiled = f"{weight.kind} brings kernels of its own"
        self._group = group
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if distributed else 0
        self.world_size = dist.get_world_size(group) if distributed else 1
        self.everyone = dist.get_world_size() if distributed else 1
        self.place = dist.get_rank() if distributed else 0

    def forward(self, **inputs: Any) -> Any:
        """Runs one forward of the model. All ranks must call it equally often, in the same order."""
        return self.module(**inputs)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """All-reduces a sum in place, over the ranks that see different data."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def maxima(self, numbers: Sequence[int]) -> list[int]:
        """Returns the maximum of each number over the whole world, by an all-reduce of int64."""
        tensor = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        if self.everyone > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [int(number) for number in tensor.tolist()]

    def total(self, tensor: Tensor) -> Tensor:
        """All-reduces a sum in place over the whole world: of parts of products with sharded weights."""
        if self.everyone > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, thing: Thing) -> list[Thing]:
        """Gathers `thing` of each rank of the whole world, pickled; for rare use."""
        things = [thing] * self.everyone
        if self.everyone > 1:
            dist.all_gather_object(things, thing)
        return things

    def weights(self) -> Iterator[Weight]:
        """Yields each parameter once, in the model's order; what packed layers hold is one matrix each."""
        packed = {id(weight.module): (name, weight) for name, weight in self.packed.items()}
        seen: set[int] = set()
        for path, module in self.module.named_modules():
            name, weight = packed.get(id(module), ("", None))
            shared = id(getattr(module, "weight", module))  # tied embeddings hold one packed tensor
            if weight is not None and shared not in seen:
                seen.add(shared)
                yield Weight(name, weight.shape, weight.dtype, True)
            for attribute, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen or (weight is not None and attribute != "bias"):
                    continue
                seen.add(id(parameter))
                own, dtype = f"{path}.{attribute}".lstrip("."), self.compute_dtype(parameter)
                yield Weight(own, self.shape(parameter), dtype, parameter.requires_grad)

    def floating_dtypes(self) -> set[torch.dtype]:
        """Returns the dtypes in which forwards see parameters."""
        return {weight.dtype for weight in self.weights() if weight.dtype.is_floating_point}

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Returns the global shape of a parameter."""
        return parameter.shape

    def compute_dtype(self, parameter: nn.Parameter) -> torch.dtype:
        """Returns the dtype of a parameter while a forward uses it."""
        return parameter.dtype

    def block(self, parameter: nn.Parameter) -> Block:
        """Returns the part of a parameter, seen as a matrix, that this rank's forwards multiply with."""
        m, n = as_matrix(self.shape(parameter))
        return Block(range(m), range(n))

    def local(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns this rank's part of a layer's input and result, for which y = x W[block]ᵀ holds up to
        a sum over the ranks that share the weight's matrix."""
        return x, y

    @abstractmethod
    def each_shard(self, names: Collection[str], write: Callable[[ShardView], None]) -> None:
        """Calls `write` on each shard this rank holds of the named parameters, and makes sure that
        the next forward sees the writes. Always visits the same shards in the same order."""

    @abstractmethod
    def full_tensors(self) -> Iterator[tuple[list[str], Tensor | None]]:
        """Yields every entry of the model's state_dict, one at a time: all names (tied weights have
        several) and a full CPU copy on rank 0, None elsewhere. All ranks must run it to its end."""


def named_state(
    module: nn.Module, packed: Mapping[str, PackedWeight] | None = None
) -> list[tuple[list[str], Tensor]]:
    """Returns the state_dict's tensors in its order, each once, with all its names; in place of what a packed
    layer holds a tensor without values, of the shape and dtype of its matrix."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    layers = {weight.path: weight for weight in (packed or {}).values()}
    stands_for: dict[int, Tensor] = {}  # by id of a packed tensor, which tied layers share
    for name, tensor in module.state_dict(keep_vars=True).items():
        weight = next((layers[p] for p in _prefixes(name) if p in layers), None)
        if weight is not None and name != f"{weight.path}.bias":
            key = id(getattr(weight.module, "weight", weight.module))
            tensor = stands_for.setdefault(
                key, torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            )
            name = f"{weight.path}.weight"
            if name in names.get(id(tensor), []):
                continue
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    return [(names[key], tensors[key]) for key in names]


def _prefixes(name: str) -> Iterator[str]:
    """Yields the paths of all modules that a tensor's name is within."""
    return (name[:place] for place, letter in enumerate(name) if letter == ".")
