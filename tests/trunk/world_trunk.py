"""A split forward over sharded weights: the losses of one process, and gathers of the late blocks alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import tiny as shapes
import torch
import world_fsdp2
from deep import BEHIND, FIELDS, LAYERS, VISITS, deep, engine_of, numbered
from once import once
from tiny import part_of, tiny
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from traffic import Traffic
from world_replicated import assert_equal_on_all_ranks
from world_traffic import padded
from world_zero3 import ZERO3
from worlds import World, case

from tezo_ds import StepReport
from tezo_ds.sharding import zero3
from tezo_ds.tasks.batches import lane_indices
from tezo_ds.trunk.alike import Alike

BUCKETS = {"stage3_prefetch_bucket_size": 1000, "stage3_max_live_parameters": 4000}
CACHED = {"trunk_cache": "memory"}
TRIED = {1: 2, 2: 5, 3: 3, 4: 2}  # of the ways to split, by ranks: all of them once


def shards(world: World, tied: bool) -> dict[str, nn.Module]:
    """Makes the same model under each sharding."""
    zero = {"zero_optimization": {**ZERO3["zero_optimization"], **BUCKETS}}
    found: dict[str, nn.Module] = {
        "zero3": zero3.wrap(deep("llama", tied), zero),
        "fsdp2": world_fsdp2.shard(deep("llama", tied)),
    }
    if world.size == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        found["hybrid"] = world_fsdp2.shard(deep("llama", tied), mesh)
    return found


@contextmanager
def noted(made_once: list[Tensor]) -> Iterator[None]:
    """Context manager: notes what is made once for all branches: a norm, and products of q, k and v."""
    repeat = Alike._repeat

    def note(alike: Alike, y: Tensor) -> Tensor:
        made_once.append(y)
        return repeat(alike, y)

    with mock.patch.object(Alike, "_repeat", note):
        yield


def mine(step: int, world: World) -> dict[str, Tensor]:
    """Returns this rank's part of a step's three examples, none of another rank's ever."""
    whole = numbered(VISITS[step])
    return part_of(whole, world.rank, world.size) if world.rank < 3 else idle(whole)


def idle(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**{k: v[:1] for k, v in batch.items()}, "labels": batch["labels"][:1] * 0 - 100}


@once
def whole_forwards(tied: bool, fields: str) -> list[StepReport]:
    """Reports steps of one process whose forwards are not split; fields as JSON."""
    plain = {**json.loads(fields), "trunk_cache": "off", "shared_trunk": False}
    engine = engine_of(deep("llama", tied), **plain)
    return [engine.step(numbered(rows)) for rows in VISITS]


@case(worlds=(1, 2, 3, 4))
def split_forwards_are_those_of_one_process(world: World) -> None:
    vectors = {"train_vectors": True, "micro_batch": 1, **CACHED}
    behind = {"include": BEHIND["llama"], **CACHED, "train_vectors": True}
    ways = (
        (True, CACHED),
        (False, behind),
        (False, vectors),
        (False, {"probe": "inplace"}),
        (True, {}),
    )
    for tied, fields in ways[: TRIED[world.size]]:
        reports = whole_forwards(tied, json.dumps(fields))
        for name, model in shards(world, tied).items():
            engine, made_once = engine_of(model, **fields), []
            for step, theirs in enumerate(reports):
                with noted(made_once):
                    ours = engine.step(mine(step, world))
                torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
                torch.testing.assert_close(ours.kappa, theirs.kappa, rtol=5e-3, atol=5e-3)
            trunk = engine.objective.trunk
            assert trunk is not None and trunk.found is not None, (name, fields, str(trunk))
            assert trunk.found.first == (3 if "include" in fields else 2)
            tail = trunk.rest.way.tail
            assert tail is not None and tail.alike == ("include" in fields)
            if "train_vectors" in fields:  # the norm does, and no two branches enter q, k, v alike
                assert not made_once
            elif "probe" not in fields:
                assert len(made_once) >= 4 * len(reports), (name, len(made_once))
            assert_equal_on_all_ranks(engine.method.coefficients)


@case(worlds=(3,))
def later_visits_gather_the_late_blocks_alone(world: World) -> None:
    for name, model in shards(world, tied=False).items():
        module = getattr(model, "module", model)
        early = [*module.model.layers[:2].parameters()]
        table = [*module.model.embed_tokens.parameters()]
        everything = padded(module.parameters(), world.size)
        late = everything - padded(early, world.size)
        if name == "zero3":  # FSDP2 gathers the embedding with the root's other parameters
            late -= padded(table, world.size)
        for fields, first, later in (({}, everything, everything), (CACHED, everything, late)):
            engine, seen = engine_of(model, **fields), []
            engine.settle(mine(0, world))
            for step in (0, 1, 2, 3, 4, 5, 3, 4):
                with Traffic() as traffic:
                    engine.step(mine(step, world))
                seen.append(traffic)
            gathered = [traffic.gathered for traffic in seen]
            # Where the order changes DeepSpeed reads ahead in the old one, and takes two steps to learn.
            assert gathered[1:3] == [first] * 2, (name, gathered, first)
            assert gathered[5:] == [later] * 3, (name, gathered, later)
            assert max(gathered[3:5]) <= first
            others = [c.nbytes for c in seen[-1].calls if not c.gathers]
            scalars = 16 * 2 * FIELDS["queries"] + 8
            assert others == [16] * bool(fields) + [scalars], (name, seen[-1].calls)


@case(worlds=(2,))
def split_forwards_go_with_tensor_parallelism(world: World) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "model"))
    with mock.patch.dict(shapes.SIZES, num_hidden_layers=LAYERS):
        split = world_fsdp2.tensor_parallel("llama", mesh["model"])
        whole = tiny("llama", False, mlp=world_fsdp2.MLP)
    engine = engine_of(world_fsdp2.shard(split, mesh["data"]), **CACHED)
    alone = engine_of(whole, shared_trunk=False)
    alone.sharding.world_size = 1
    for rows in VISITS:
        ours, theirs = engine.step(numbered(rows)), alone.step(numbered(rows))
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(ours.kappa, theirs.kappa, rtol=5e-3, atol=5e-3)
    assert engine.objective.trunk is not None and engine.objective.trunk.found is not None


@case(worlds=(2, 3))
def a_lane_keeps_an_example_on_its_rank(world: World) -> None:
    for n, size in ((9, 4), (5, 7)):
        mine = [i for s in range(12) for i in lane_indices(n, size, s, 0, world.rank, world.size)]
        parts: list[list[int]] = [[] for _ in range(world.size)]
        torch.distributed.all_gather_object(parts, sorted(set(mine)))
        if size <= n:
            assert sorted(i for part in parts for i in part) == list(range(n))
