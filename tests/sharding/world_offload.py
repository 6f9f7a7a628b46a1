"""Parameters that live in CPU memory or in files: equal to one process, one pass over them a step."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor.partitioned_param_swapper import (
    AsyncPartitionedParameterSwapper as Swapper,
)
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import Init
from file_aio import toy_nvme
from tiny import make_batch, part_of, tiny
from torch import Tensor
from torch.overrides import TorchFunctionMode
from world_hazards import assert_write_was_lost, assert_write_was_seen, fail_in_the_middle, refusal
from world_replicated import alone, assert_same_run
from world_zero3 import ZERO3, sharded
from worlds import World, case

import tezo_ds
from tezo_ds.sharding import ShardView, zero3

CPU = {"offload_param": {"device": "cpu", "pin_memory": False}}
PINNED = {"offload_param": {"device": "cpu", "pin_memory": True}}
APART = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
BUFFERS = 4
_folders = itertools.count()


def nvme(world: World) -> dict[str, Any]:
    """Returns the offload to a folder of its own, as DeepSpeed empties the folder that it gets."""
    path = str(world.folder / f"nvme{next(_folders)}")
    sizes = {"buffer_count": BUFFERS, "buffer_size": 1500}
    return {"offload_param": {"device": "nvme", "nvme_path": path, **sizes}}


def shards_of(engine: tezo_ds.Engine) -> dict[str, Tensor]:
    """Returns DeepSpeed's tensor of each parameter; its `ds_numel` counts the padding."""
    return {name: p.ds_tensor for name, p in engine.sharding.module.named_parameters()}


def in_files(engine: tezo_ds.Engine) -> dict[str, Tensor]:
    shards = shards_of(engine)
    return {n: s for n, s in shards.items() if s.final_location == OffloadDeviceEnum.nvme}


def free_buffers(engine: tezo_ds.Engine) -> int:
    parameter: Any = next(engine.sharding.module.parameters())
    return int(parameter.nvme_swapper.available_swap_in_buffers())


def assert_trains_and_merges(
    world: World, zero: dict[str, Any], kind: str, tied: bool, probe: str
) -> tezo_ds.Engine:
    """Asserts that a few steps and the merge equal those of one process without offload."""
    engine = sharded(kind, tied, {"probe": probe}, zero)
    assert_same_run(engine, world, kind, tied, {"probe": probe})
    reference = alone(kind, tied, {"probe": probe})
    reference.load_coefficients(engine.coefficients())
    unmerged = engine.state_dict()
    engine.merge()
    reference.merge()
    batch = make_batch(7)
    for _ in range(3):
        loss = engine.loss(part_of(batch, world.rank, world.size))
        torch.testing.assert_close(loss, reference.loss(batch), rtol=1e-5, atol=0)
    before, expected = tiny(kind, tied).state_dict(), reference.sharding.module.state_dict()
    for found in (unmerged, engine.state_dict()):
        assert list(found) == (list(expected) if world.rank == 0 else [])
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    for matrix in engine.space.matrices:
        assert (before[matrix.name] - expected[matrix.name]).abs().max() > 1e-4
    return engine


@case(worlds=(1, 3))
def cpu_offload_runs_as_one_process(world: World) -> None:
    for zero, probe in ((CPU, "inplace"), (PINNED, "fused")):
        engine = assert_trains_and_merges(world, zero, "llama", True, probe)
        assert all(shard.device.type == "cpu" for shard in shards_of(engine).values())


@case(worlds=(1, 3))
def nvme_offload_runs_as_one_process(world: World) -> None:
    with toy_nvme():
        for kind, tied, probe in (("llama", True, "inplace"), ("opt", False, "fused")):
            engine = assert_trains_and_merges(world, nvme(world), kind, tied, probe)
            assert len(engine.space.matrices) <= len(in_files(engine)) < len(shards_of(engine))
            assert free_buffers(engine) == BUFFERS


@case(worlds=(1, 2))
def a_given_dtype_is_kept_where_there_is_no_float16(world: World) -> None:
    """Hazard: on a CPU without float16, DeepSpeed takes bfloat16 for any dtype that it is given by hand:
    for the buffers of NVMe in every engine, and for the weights of a model that is made under
    `zero.Init`."""
    with (
        toy_nvme(),
        mock.patch.object(type(get_accelerator()), "is_fp16_supported", lambda _: False),
    ):
        assert_trains_and_merges(world, nvme(world), "llama", True, "fused")
        by_hand = {"config_dict_or_path": zero3.prepare(ZERO3), "dtype": torch.float32}
        with deepspeed.zero.Init(**by_hand):
            linear = torch.nn.Linear(3, 5)
        assert linear.weight.ds_tensor.dtype == torch.float32

        with mock.patch.object(Init, "_set_dtype", zero3._set_dtype):
            engine = sharded(zero=nvme(world))
            batch = part_of(make_batch(7), world.rank, world.size)
            assert "same dtype" in refusal(lambda: engine.loss(batch), RuntimeError)
            with deepspeed.zero.Init(**by_hand):
                linear = torch.nn.Linear(3, 5)
            assert linear.weight.ds_tensor.dtype == torch.bfloat16


@case(worlds=(3,))
def writes_to_nvme_reach_their_files_one_at_a_time(world: World) -> None:
    with toy_nvme() as files:
        engine = sharded(zero=nvme(world))
        assert_write_was_seen(engine, world)
        names = {matrix.name for matrix in engine.space.matrices}
        written, free = files.written, []

        def look(view: ShardView) -> None:
            free.append((free_buffers(engine), bool(view.local.isfinite().all())))

        engine.sharding.each_shard(names, look)
        assert free == [(BUFFERS - 1, True)] * len(names)
        assert files.written == written  # what was only read is not written again
        engine.sharding.each_shard(names, lambda view: view.local.mul_(2))
        assert files.written > written
        assert free_buffers(engine) == BUFFERS

        engine = sharded(zero=nvme(world))
        forget = Swapper.remove_partition_and_release_buffers
        with mock.patch.object(Swapper, "swap_out_and_release", forget):
            assert_write_was_lost(engine, world)


@case(worlds=(2,))
def a_forward_that_fails_drops_what_was_read_ahead(world: World) -> None:
    batch = part_of(make_batch(7), world.rank, world.size)

    def failed() -> tezo_ds.Engine:
        # Once DeepSpeed knows the order of layers, it reads files further ahead than it gathers.
        engine = sharded(zero={**nvme(world), "stage3_prefetch_bucket_size": 1})
        for _ in range(3):
            engine.step(batch)
        fail_in_the_middle(engine, batch)
        return engine

    with toy_nvme():
        engine = failed()
        assert free_buffers(engine) == BUFFERS
        assert_write_was_seen(engine, world)

        def partition(self: zero3.Zero3) -> None:
            self._offload.partition_all_parameters()

        with mock.patch.object(zero3.Zero3, "_partition", partition):
            engine = failed()
            assert free_buffers(engine) < BUFFERS
            assert "already available or in flight" in refusal(engine.merge, AssertionError)


@case(worlds=(2,))
def buffers_too_small_for_the_model_are_named(world: World) -> None:
    with toy_nvme():
        zero = nvme(world)
        zero["offload_param"]["buffer_size"] = 600
        message = refusal(lambda: sharded(zero=zero), tezo_ds.ConfigError)
        assert "buffer size 600" in message and "raise buffer_size" in message
        zero["offload_param"] |= {"buffer_size": 1500, "buffer_count": 1}
        engine = sharded(zero=zero)  # the tied embedding keeps one, so a layer finds none
        message = refusal(
            lambda: [engine.loss(make_batch(2)) for _ in range(3)], tezo_ds.ConfigError
        )
        assert "Not enough buffers" in message and "buffer_count" in message
        assert free_buffers(engine) == 1


class Moved(TorchFunctionMode):
    """Counts of the elements of offloaded shards that are sent to where forwards run.

    On the CPU nothing is copied, but DeepSpeed asks for it at the same place as on a GPU.
    """

    def __init__(self, engine: tezo_ds.Engine) -> None:
        super().__init__()
        self._addresses = {shard.data_ptr() for shard in shards_of(engine).values()}
        self.elements = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = [*args[1:], *(kwargs or {}).values()]
        to_device = func is Tensor.to and any(isinstance(x, str | torch.device) for x in given)
        if to_device and args[0].data_ptr() in self._addresses:
            self.elements += args[0].numel()
        return func(*args, **(kwargs or {}))


@case(worlds=(1, 2))
def a_step_brings_offloaded_weights_in_once(world: World) -> None:
    """Offloaded weights come in once a step if fused, whatever Q; once a branch in place. Counted from the
    third forward on: until then DeepSpeed, which learns the order of layers, brings a tied weight in
    for each use."""
    batch = part_of(make_batch(7), world.rank, world.size)
    for probe, queries in (("fused", 1), ("fused", 3), ("inplace", 2)):
        engine = sharded(fields={"probe": probe, "queries": queries}, zero=PINNED)
        passes = 1 if probe == "fused" else 2 * queries
        held = sum(shard.numel() for shard in shards_of(engine).values())
        for step in range(4):
            with Moved(engine) as moved:
                engine.step(batch)
            assert step < 2 or moved.elements == passes * held, (probe, queries, step)

    # Two uses too far apart for DeepSpeed to keep the weight in between: the count shows it.
    engine = sharded(zero={**PINNED, **APART})
    for _ in range(3):
        with Moved(engine) as moved:
            engine.step(batch)
    tied = shards_of(engine)["model.embed_tokens.weight"].numel()
    assert moved.elements == held + tied


def aligned(shard: Tensor) -> int:
    """Returns the elements of the file that holds a float32 shard: whole blocks of 1,024 bytes."""
    return -(-shard.ds_numel // 256) * 256


@case(worlds=(1, 3))
def a_step_reads_the_files_once(world: World) -> None:
    """The fused probe reads every file once, whatever Q, and writes none. In place, trained files are read
    and written once more for each branch, which is reached from the one before, and once to restore."""
    batch = part_of(make_batch(7), world.rank, world.size)
    with toy_nvme() as files:
        for probe, queries in (("fused", 1), ("fused", 3), ("inplace", 2)):
            engine = sharded(fields={"probe": probe, "queries": queries}, zero=nvme(world))
            for _ in range(3):
                engine.step(batch)
            trained = {matrix.name for matrix in engine.space.matrices}
            every = sum(map(aligned, in_files(engine).values()))
            ours = sum(aligned(s) for name, s in in_files(engine).items() if name in trained)
            files.read = files.written = 0
            engine.step(batch)
            if probe == "fused":
                expected = every, 0
            else:
                visits = (2 * queries + 1) * ours
                expected = 2 * queries * every + visits, visits
            assert (files.read, files.written) == expected, (probe, queries)
