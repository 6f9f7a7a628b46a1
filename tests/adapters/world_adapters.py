"""Adapters over sharded weights: the oracle's run, on shards that divide nothing, tied and untied."""

from __future__ import annotations

import world_fsdp2
import world_zero3
from adapter_oracle import PUBLISHED, RUN, assert_the_oracle, batch_of, oracle
from tiny import part_of, tiny
from world_replicated import alone, assert_equal_on_all_ranks
from world_traffic import plain_forwards, steps_of, trainer
from worlds import World, case

import tezo_ds

WAYS = {"ZeRO-3": world_zero3.sharded, "FSDP2": world_fsdp2.sharded}
RUNS = {
    "tt": ("tezo-m", {**PUBLISHED, "adapter_sites": "mlp"}),
    "tt, zero": ("tezo", {"adapter": "tt", "lr": 1e-1}),
    "lora": ("tezo-adam-coef", {"adapter": "lora", "rank": 3, "lr": 1e-3}),
}


def fields_of(name: str) -> dict:
    method, fields = RUNS[name]
    return {**RUN, **fields, "method": method, "lr": fields.get("lr", RUN["lr"])}


@case(worlds=(2, 3))
def adapters_take_the_oracles_steps(world: World) -> None:
    for name, way, tied in (
        ("tt", "ZeRO-3", True), ("tt", "FSDP2", False), ("lora", "ZeRO-3", False),
        ("lora", "FSDP2", True),
    ):  # fmt: skip
        method, fields = RUNS[name]
        engine = WAYS[way]("llama", tied, fields_of(name))
        assert engine.sharding.world_size == world.size
        assert_the_oracle(
            engine, oracle(method, fields, tied), world.rank, world.size, close=3e-3
        )  # float32 weights, which DeepSpeed insists on
        engine.check()
        assert_equal_on_all_ranks(engine.method.coefficients)


@case(worlds=(2,))
def ranks_and_examples_have_directions_of_their_own(world: World) -> None:
    """Slopes are those that one process finds for each part of the batch, or each example, alone."""
    fields = {**fields_of("tt"), "queries": 1}
    for way, placement in (("ZeRO-3", "per_rank"), ("FSDP2", "per_example")):
        engine = WAYS[way]("llama", True, {**fields, "placement": placement})
        parts = world.size if placement == "per_rank" else 7
        report = engine.step(part_of(batch_of(0), world.rank, world.size))
        assert len(report.kappa) == parts
        labels = (batch_of(0)["labels"][:, 1:] != -100).sum(dim=1)
        weights = labels * len(labels) / labels.sum() if placement == "per_example" else [1] * parts
        for q, weight in enumerate(weights):
            by_itself = alone("llama", True, {**fields, "queries": parts})
            theirs = by_itself.step(part_of(batch_of(0), q, parts)).kappa[q]
            theirs *= float(weight)  # an example's share in the mean of all labels
            assert abs(report.kappa[q] - theirs) < 2e-3 * max(1.0, abs(theirs)), (placement, q)
        for step in range(1, 3):
            engine.step(part_of(batch_of(step), world.rank, world.size))
        engine.check()
        assert_equal_on_all_ranks(engine.method.coefficients)


@case(worlds=(2, 3))
def a_step_gathers_each_weight_once_whatever_q(world: World) -> None:
    model = world_fsdp2.shard(tiny())
    gathered = plain_forwards(model, world)[-1].gathered
    for queries in (1, 4):
        engine = trainer(model, **{**fields_of("tt"), "queries": queries})
        for traffic in steps_of(engine, part_of(batch_of(0), world.rank, world.size)):
            assert traffic.gathered == gathered
            others = [(call.op, call.nbytes) for call in traffic.calls if "gather" not in call.op]
            assert others == [("allreduce_", 16 * 2 * queries + 8)]


@case(worlds=(2,))
def weights_may_lie_elsewhere_and_a_flipped_bit_is_found(world: World) -> None:
    fields, batch = fields_of("tt, zero"), part_of(batch_of(0), world.rank, world.size)
    plain = world_zero3.sharded(fields=fields)
    away = world_zero3.sharded(fields=fields, zero={"offload_param": {"device": "cpu"}})
    for _ in range(3):
        assert plain.step(batch).kappa == away.step(batch).kappa
    away.check()
    if world.rank:
        away.method.coefficients[0] += 1e-12
    try:
        away.check()
    except tezo_ds.ShardingError as error:
        assert "coefficients of model.layers.0.self_attn.o_proj.adapter.down.0" in str(error)
    else:
        raise AssertionError("not found")
