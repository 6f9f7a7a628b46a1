"""Rewards over sharded weights: rewards and coefficients to the bit those of one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from once import once
from rewarding import MOST, batch_of, ending, engine_of, judge
from tiny import tiny
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from traffic import Traffic
from world_fsdp2 import shard
from world_replicated import assert_equal_on_all_ranks
from world_traffic import padded
from world_zero3 import ZERO3
from worlds import World, case

import tezo_ds
from tezo_ds.errors import RewardFailed
from tezo_ds.sharding import zero3

FIELDS = {"rank": 3, "rho": 5e-2, "lr": 3e-3, "seed": 11, "queries": 2, "shape": "rank"}
STEPS = ([0, 1, 2, 3], [2, 0], [3])  # the last leaves ranks without a prompt


def model() -> nn.Module:
    return ending(tiny("llama", tied=False))


def ways() -> dict[str, nn.Module]:
    return {"zero3": zero3.wrap(model(), dict(ZERO3)), "fsdp2": shard(model())}


def mine(rows: list[int], world: World) -> dict[str, Any]:
    """Returns a rank's prompts of a step, as uneven as they can be; of some ranks none."""
    return batch_of([row for i, row in enumerate(rows) if i % world.size == world.rank])


@once
def steps_of_one(more: str) -> tuple[list[tuple[float, ...]], dict[str, Tensor]]:
    """Returns rewards of some steps of one process, and the coefficients after them."""
    engine = engine_of(model(), {**FIELDS, **eval(more)})  # written below
    engine.sharding.world_size, engine.sharding.rank, engine.sharding.everyone = 1, 0, 1
    rewards = [engine.step(batch_of(rows)).rewards for rows in STEPS]
    return rewards, engine.coefficients()  # type: ignore[return-value]


@case(worlds=(2, 3))
def steps_are_those_of_one_process(world: World) -> None:
    """In a larger world drawn, and in two forwards."""
    for more in [{}] if world.size == 2 else [{"temperature": 0.8, "branch_chunk": 3}]:
        rewards, coefficients = steps_of_one(repr(more))
        assert len({r for step in rewards for r in step}) > 4
        for name, sharded in ways().items():
            engine = engine_of(sharded, {**FIELDS, **more})
            found = [engine.step(mine(rows, world)).rewards for rows in STEPS]
            assert found == rewards, f"{name} {more}"
            for key, right in coefficients.items():
                assert torch.equal(engine.coefficients()[key], right), f"{name} {more}: {key}"
            engine.check()


@case(worlds=(4,))
def ranks_that_share_their_prompts_by_tensor_parallelism_are_one_process(world: World) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    split = ending(tiny("llama", tied=False, mlp=38))
    for block in split.model.layers:
        plan = {"mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        parallelize_module(block, mesh["model"], {**plan, "mlp.gate_proj": ColwiseParallel()})
    engine = engine_of(shard(split, mesh["data"]), FIELDS)
    one = engine_of(ending(tiny("llama", tied=False, mlp=38)), FIELDS)
    one.sharding.world_size, one.sharding.rank, one.sharding.everyone = 1, 0, 1
    place = World(engine.sharding.rank, engine.sharding.world_size, world.folder)
    for rows in STEPS:
        assert engine.step(mine(rows, place)).rewards == one.step(batch_of(rows)).rewards


@case(worlds=(2,))
def ranks_measure_directions_of_their_own(world: World) -> None:
    """Shaped over the branches of all ranks; each has its own prompts, of other lengths."""
    fields = {**FIELDS, "placement": "per_rank"}
    rows = [[0, 1, 2], [3]][world.rank]
    for sharded in ways().values():
        engine = engine_of(sharded, fields)
        report = engine.step(batch_of(rows))
        assert report.rewards is not None and len(report.rewards) == 2 * 2 * world.size
        shared = engine_of(model(), {**fields, "placement": "shared", "queries": 4})
        shared.sharding.world_size, shared.sharding.rank, shared.sharding.everyone = 1, 0, 1
        by_rows = [shared_rewards(shared, own) for own in ([0, 1, 2], [3])]
        assert report.rewards == (*by_rows[0][:4], *by_rows[1][4:])
        assert max(report.kappa) <= 1 / (2 * fields["rho"]), "ranks among eight branches"
        assert_equal_on_all_ranks(engine.method.state["coefficients"].data)
        engine.check()


def shared_rewards(engine: tezo_ds.Engine, rows: list[int]) -> tuple[float, ...]:
    engine.step_index = 0
    with torch.no_grad():
        losses = engine.measuring.losses(batch_of(rows), 0)
    return tuple((-losses).flatten().tolist())


@case(worlds=(2,))
def a_function_that_fails_on_one_rank_ends_the_step_on_all(world: World) -> None:
    broken = [world.rank == 1]

    def failing(
        prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]
    ) -> list[float]:
        if broken[0]:
            raise RewardFailed("reward broken: raised ValueError")
        return judge(prompts, completions, columns)

    for sharded in ways().values():
        broken[0] = world.rank == 1
        engine = engine_of(sharded, FIELDS, judge=failing)
        expect_failure(lambda e=engine: e.step(mine(STEPS[0], world)), world)
        broken[0] = False
        rewards, _ = steps_of_one("{}")
        assert engine.step(mine(STEPS[0], world)).rewards == rewards[0], "nothing is lost"


def expect_failure(step: Callable[[], Any], world: World) -> None:
    try:
        step()
    except RewardFailed as error:
        assert error.speaks is (world.rank == 1)
        assert ("another rank" in str(error)) is (world.rank != 1)
    else:
        raise AssertionError("no error")


@case(worlds=(2,))
def every_token_gathers_the_model_once(world: World) -> None:
    """Whatever the number of branches, and prompts; besides gathers there are scalars."""
    for queries, name in ((2, "zero3"), (3, "fsdp2")):
        plain = tiny("llama", tied=False)  # whose texts do not end
        sharded = zero3.wrap(plain, dict(ZERO3)) if name == "zero3" else shard(plain)
        engine = engine_of(sharded, {**FIELDS, "queries": queries})
        for _ in range(2):  # DeepSpeed learns the order of layers
            engine.step(mine([0, 1, 2], world))
        with Traffic() as traffic:
            engine.step(mine([0, 1, 2], world))
        numel = padded(engine.sharding.module.parameters(), world.size)
        gathered = sum(call.numel for call in traffic.calls if call.gathers)
        assert gathered == MOST * numel, f"{name}: {gathered / numel} models for {MOST} tokens"
        others = [call.nbytes for call in traffic.calls if not call.gathers]
        assert sum(others) <= 8 * (MOST + 2) + 2 * 16 * queries + 8 + 24, f"{name}: {others}"
