"""One rank of a run that is not there: the engine's own step on tensors without values, in a process group
without others.

Real are the model's code, `fully_shard`, the engine, its probe and its method, so which collectives run, with
which sizes, and which tensors live at once. Not real are the values of weights, activations and factors;
what collectives bring; and so the losses, in whose place numbers are made up once they are summed over ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tezo_ds import rng
from tezo_ds.engine import Engine
from tezo_ds.errors import ConfigError
from tezo_ds.fsdp_loading import FsdpPlan, shard_whole
from tezo_ds.live_bytes import LiveBytes
from tezo_ds.plan.job import Job
from tezo_ds.sharding.fsdp2 import Fsdp2

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Counted:
    """Of a step.

    Attributes:
        gathers: all-gathers.
        gathered: bytes that they brought together.
        scalars: bytes of all other collectives.
        tensors: bytes of tensors at the peak, the shards and factors included.
    """

    gathers: int
    gathered: int
    scalars: int
    tensors: int


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


class Absent(Fsdp2):
    """A model on a mesh whose other ranks are not there.

    Args:
        module: `fully_shard` was applied to it; its tensors have no values.
        fake: the mode that they are of.
        live: counts its forwards' tensors.
    """

    def __init__(self, module: nn.Module, fake: FakeTensorMode, live: LiveBytes) -> None:
        super().__init__(module)
        self._fake, self._live = fake, live
        self.collectives = Collectives()

    def forward(self, **inputs: Any) -> Any:
        """See `Sharding`; what is made within it has no values either."""
        with self._fake, self._live, self.collectives:
            return super().forward(**inputs)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """See `Sharding`; numbers that differ, as losses do."""
        with self.collectives:
            super().all_reduce(tensor)
        numbers = torch.arange(1, tensor.numel() + 1, dtype=tensor.dtype)
        return numbers.view(tensor.shape)

    def maxima(self, numbers: Sequence[int]) -> list[int]:
        """See `Sharding`; of this rank alone."""
        return list(numbers)

    def gather(self, thing: Thing) -> list[Thing]:
        """See `Sharding`; all ranks would say the same."""
        return [thing] * self.everyone


def count(job: Job) -> Counted:
    """Runs two steps and counts the second.

    Args:
        job: of sharding fsdp2 or fsdp2-hybrid, in a process without a process group.

    Raises:
        ConfigError: of another sharding; it has one rank; there is a process group.
    """
    if not job.layout.by_rows or job.gather_ranks == 1:
        raise ConfigError(
            f"--dry-run: {job.sharding} on {job.gather_ranks} ranks has no gathers that it could count; use "
            "--sharding fsdp2 or fsdp2-hybrid on more ranks (ZeRO-3's bytes are those of fsdp2, but for "
            "padding)"
        )
    if dist.is_initialized():
        raise ConfigError("--dry-run makes a process group of its own; start it without a launcher")
    fake, live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    with _world(job.cluster.world), _without_numbers(fake), live:
        sharding = Absent(_sharded(job, fake), fake, live)
        engine = Engine(sharding, job.config.model_copy(update={"check_every": 0}), None)
        sharding.module.eval()
        batch = _batch(job)
        engine.step(batch)
        sharding.collectives.calls.clear()
        live.peak = 0
        engine.step(batch)
    calls = sharding.collectives.calls
    gathers = [nbytes for gathers, nbytes in calls if gathers]
    return Counted(
        len(gathers), sum(gathers), sum(n for gathers, n in calls if not gathers), live.peak
    )


def _sharded(job: Job, fake: FakeTensorMode) -> nn.Module:
    module = copy.deepcopy(job.module)
    with fake:
        module.to_empty(device="cpu")
    replicas = job.cluster.world // job.gather_ranks
    return shard_whole(module, torch.device("cpu"), FsdpPlan(replicas))


def _batch(job: Job) -> dict[str, Tensor]:
    ids = torch.ones(job.examples, job.length, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    labels[:, job.length - job.labels :] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@contextmanager
def _world(size: int) -> Iterator[None]:
    """Within it, this process is rank 0 of so many."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _without_numbers(fake: FakeTensorMode) -> Iterator[None]:
    """Within it, random numbers addressed by rows (factors, dense directions) are not drawn; those of τ,
    which have a key each, are."""
    drawn = rng._addressed

    def addressed(
        each: int, key: Any, index: Tensor, width: int, stream: Any, first: int
    ) -> Tensor:
        if isinstance(key[0], Tensor):
            return drawn(each, key, index, width, stream, first)
        with fake:
            return torch.empty(len(index), width)

    rng._addressed = addressed
    try:
        with torch.no_grad():
            yield
    finally:
        rng._addressed = drawn
