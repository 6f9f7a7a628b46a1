"""ZeRO-3, equal to one process: bits of factors, losses, coefficients, merged weights."""

from __future__ import annotations

import deepspeed
import torch
from tiny import make_batch, part_of, tiny
from torch import nn
from world_replicated import FIELDS, alone, assert_equal_on_all_ranks, assert_same_run
from worlds import World, case

import tezo_ds
from tezo_ds.directions.lowrank import FixedFactors
from tezo_ds.sharding import ShardView, zero3

ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def sharded(
    kind: str = "llama", tied: bool = True, fields: dict | None = None, zero: dict | None = None,
    model: nn.Module | None = None, **config: object,
) -> tezo_ds.Engine:  # fmt: skip
    """Makes an engine on a partitioned tiny model."""
    optimization = {**ZERO3["zero_optimization"], **(zero or {})}
    model = tiny(kind, tied) if model is None else model
    block = {"zero_optimization": optimization, **config, "tezo": {**FIELDS, **(fields or {})}}
    return tezo_ds.initialize(model, block)


def views_of(engine: tezo_ds.Engine) -> list[ShardView]:
    """Returns the views of the trained matrices' shards on this rank."""
    views: list[ShardView] = []
    engine.sharding.each_shard({m.name for m in engine.space.matrices}, views.append)
    return views


@case(worlds=(1, 2, 3))
def zero3_runs_as_one_process(world: World) -> None:
    for kind, tied in (("llama", True), ("opt", False)):
        for probe in ("fused", "inplace"):
            if kind == "opt":  # an engine that a user made
                of_user, *_ = deepspeed.initialize(
                    model=tiny(kind, tied), config=zero3.prepare(dict(ZERO3))
                )
                engine = tezo_ds.initialize(of_user, {**FIELDS, "probe": probe})
            else:
                engine = sharded(kind, tied, {"probe": probe})
            assert isinstance(engine.sharding, zero3.Zero3)
            for module in engine.sharding.module.modules():
                module.pre_bwd_fn = module.post_bwd_fn = None  # DeepSpeed's, for a backward pass
            assert_same_run(engine, world, kind, tied, {"probe": probe})
            assert_equal_on_all_ranks(engine.method.coefficients)
            assert engine.objective._head.mode == "chunks"


@case(worlds=(2, 3, 4))
def shards_take_the_rows_of_U_they_need(world: World) -> None:
    engine = sharded()
    make = FixedFactors(engine.space)
    held = 0
    for view in views_of(engine):
        U, V = tezo_ds.factors(view.name, view.shape, FIELDS["rank"], FIELDS["seed"])
        shard_U, shard_V = make.left_of(view), make.right_of(view)
        assert torch.equal(shard_U, U[view.rows.start : view.rows.stop])
        assert torch.equal(shard_V, V)
        assert len(view.rows) <= view.shape[0] // world.size + 2
        held += view.numel
    total = torch.tensor([held])
    torch.distributed.all_reduce(total)
    assert total.item() == engine.selection.trainable_numel


@case(worlds=(1, 2, 3, 4))
def merge_writes_the_update_and_forwards_see_it(world: World) -> None:
    engine, reference = sharded(), alone("llama", True, {})
    before = {name: tensor.clone() for name, tensor in tiny().state_dict().items()}
    batch = make_batch(6)
    for _ in range(3):
        engine.step(part_of(batch, world.rank, world.size))
    reference.load_coefficients(engine.coefficients())
    coefficients, loss = engine.coefficients(), engine.loss(part_of(batch, world.rank, world.size))
    unmerged = engine.state_dict()
    engine.merge()
    assert not engine.method.coefficients.any()
    for _ in range(3):
        merged_loss = engine.loss(part_of(batch, world.rank, world.size))
        torch.testing.assert_close(merged_loss, loss, rtol=1e-5, atol=0)
    merged = engine.state_dict()
    if world.rank:
        assert merged == unmerged == {}
        return
    assert list(merged) == list(before)
    for matrix in engine.space.matrices:
        U, V = tezo_ds.factors(matrix.name, matrix.shape, matrix.rank, FIELDS["seed"])
        expected = before[matrix.name].double()
        expected = expected + (U.double() * coefficients[matrix.name]) @ V.double().t()
        assert (expected - before[matrix.name]).abs().max() > 1e-4
        torch.testing.assert_close(merged[matrix.name].double(), expected, rtol=1e-5, atol=1e-6)
        before[matrix.name] = merged[matrix.name]
    before["lm_head.weight"] = before["model.embed_tokens.weight"]
    for name in merged:
        assert torch.equal(merged[name], before[name]), name
        torch.testing.assert_close(merged[name], unmerged[name], rtol=1e-6, atol=1e-6)
    tiny().load_state_dict(merged)


@case(worlds=(2,), bits=True)
def inplace_restores_bfloat16_bit_for_bit(world: World) -> None:
    engine = sharded(fields={"probe": "inplace"}, bf16={"enabled": True})
    before = [view.local.clone() for view in views_of(engine)]
    assert before[0].dtype == torch.bfloat16
    batch = part_of(make_batch(2), world.rank, world.size)
    for _ in range(10):
        engine.step(batch)
    assert engine.method.coefficients.any()
    for view, original in zip(views_of(engine), before, strict=True):
        assert torch.equal(view.local.view(torch.int16), original.view(torch.int16)), view.name


@case(worlds=(2,))
def masked_models_and_frozen_parts_work_sharded(world: World) -> None:
    fields = {"exclude": ["*token_type*"]}
    engine = sharded("roberta", True, fields)
    assert_same_run(engine, world, "roberta", True, fields)
