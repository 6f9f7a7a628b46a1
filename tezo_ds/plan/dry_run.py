"""One rank of a run that is not there: the engine's own step on tensors without values, in a process group
without others.

Real are the model's code, `fully_shard` or DeepSpeed's engine, our engine, its probe and its method, so
which collectives run, with which sizes, and which tensors live at once. Not real are the values of weights,
activations and factors; what collectives bring; and so the losses, in whose place numbers are made up once
they are summed over ranks.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tezo_ds.engine.engine import Engine
from tezo_ds.engine.live_bytes import LiveBytes
from tezo_ds.errors import ConfigError
from tezo_ds.installed import need_deepspeed
from tezo_ds.models.fsdp import FsdpPlan, shard_whole
from tezo_ds.plan.absent import Absent, AbsentFsdp2
from tezo_ds.plan.job import Job
from tezo_ds.plan.silence import silence
from tezo_ds.rng import philox


@dataclass(frozen=True)
class Counted:
    """Counts of a step.

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


def count(job: Job) -> Counted:
    """Runs two steps and counts the second; in the first one DeepSpeed learns the order of the layers. Every
    branch runs all layers.

    Args:
        job: that gathers, in a process without a process group.

    Raises:
        ConfigError: nothing is gathered; examples have directions of their own; there is a process group;
            experts are of a dtype or a size that torch cannot follow.
    """
    if job.gather_ranks == 1:
        raise ConfigError(
            f"--dry-run: {job.sharding} over {job.gather_ranks} ranks has no gathers that it could count; "
            "use another --sharding on more ranks"
        )
    if job.config.placement == "per_example":
        raise ConfigError(
            "--dry-run: under placement per_example ranks tell each other how many examples they have, and "
            "here is one alone; set placement to shared, which has the same forwards"
        )
    if dist.is_initialized():
        raise ConfigError("--dry-run makes a process group of its own; start it without a launcher")
    fake, live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    with _world(job.cluster.world), _without_numbers(fake), live, _sharded(job, fake) as sharding:
        sharding.watched(fake, live)
        plain = {"check_every": 0, "shared_trunk": False, "trunk_cache": "off"}  # these need values
        engine = Engine(sharding, job.config.model_copy(update=plain), None)
        sharding.module.eval()
        batch = _batch(job)
        for _ in range(2):
            sharding.collectives.calls.clear()
            gc.collect()  # what a forward leaves in cycles is no tensor of the next one
            live.peak = 0
            try:
                with silence():
                    engine.step(batch)
            except RuntimeError as error:
                if "mat_a" not in str(error):  # torch's name of what its products of experts take
                    raise
                raise ConfigError(
                    "--dry-run: torch multiplies experts without values in bfloat16 of some sizes alone "
                    f"({str(error).splitlines()[0]}); try --dtype bfloat16, or leave --dry-run out"
                ) from error
    calls = sharding.collectives.calls
    gathers = [nbytes for gathers, nbytes in calls if gathers]
    return Counted(
        len(gathers), sum(gathers), sum(n for gathers, n in calls if not gathers), live.peak
    )


@contextmanager
def _sharded(job: Job, fake: FakeTensorMode) -> Iterator[Absent]:
    module: Any = copy.deepcopy(job.module)
    with fake:
        module.to_empty(device="cpu")
        module.tie_weights()  # which the line above undid
    if job.layout.by_rows:
        replicas = job.cluster.world // job.gather_ranks
        yield AbsentFsdp2(shard_whole(module, torch.device("cpu"), FsdpPlan(replicas)))
        return
    need_deepspeed("--dry-run of ZeRO-3")
    # Imported here, as it takes seconds.
    from tezo_ds.plan.absent_zero3 import in_deepspeed, partitioned

    with in_deepspeed():
        yield partitioned(job, module, fake)


def _batch(job: Job) -> dict[str, Tensor]:
    ids = torch.ones(job.examples, job.length, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    labels[:, job.length - job.labels :] = 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@contextmanager
def _world(size: int) -> Iterator[None]:
    """Context manager: inside, this process is rank 0 of `size` ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _without_numbers(fake: FakeTensorMode) -> Iterator[None]:
    """Context manager: inside, random numbers addressed by rows (factors, dense directions) are not drawn;
    τ, whose numbers have a key each, is."""
    drawn = philox._addressed

    def addressed(
        each: int, key: Any, index: Tensor, width: int, stream: Any, first: int
    ) -> Tensor:
        if isinstance(key[0], Tensor):
            return drawn(each, key, index, width, stream, first)
        with fake:
            return torch.empty(len(index), width)

    philox._addressed = addressed
    try:
        with torch.no_grad():
            yield
    finally:
        philox._addressed = drawn
