"""Directions of each example's own over ranks: the run does not depend on which rank has which example."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from unittest import mock

import torch
from deep import VISITS, deep, engine_of, numbered
from once import once
from own_directions import ORACLE, OWN, labelled, oracle, ragged
from tiny import part_of, tiny
from torch import nn
from world_everywhere import WAYS
from world_fsdp2 import shard
from world_replicated import assert_equal_on_all_ranks, recorded_collectives
from world_zero3 import ZERO3
from worlds import World, case

import tezo_ds
from tezo_ds.engine import engine as engine_module
from tezo_ds.sharding import zero3

CUTS = {1: [0, 7], 2: [0, 5, 7], 3: [0, 1, 5, 7], 4: [0, 1, 1, 5, 7]}  # the third of four has none


def mine(batch: dict[str, torch.Tensor], rank: int, size: int) -> dict[str, torch.Tensor]:
    """Returns a rank's rows of seven; a rank without any gets one that carries no label."""
    start, end = CUTS[size][rank : rank + 2]
    share = {key: value[start : max(end, start + 1)].clone() for key, value in batch.items()}
    if start == end:
        share["labels"][:] = -100
    return share


def alone(make: object, fields: dict) -> tezo_ds.Engine:
    engine = tezo_ds.initialize(make(), fields)  # type: ignore[operator]
    engine.sharding.world_size, engine.sharding.rank = 1, 0
    engine.objective.first = None
    return engine


def sharded(world: World, make: object) -> dict[str, nn.Module]:
    plain = make  # type: ignore[assignment]
    return {
        "replicated": plain(), "zero3": zero3.wrap(plain(), ZERO3), "fsdp2": shard(plain()),
    }  # type: ignore[operator]  # fmt: skip


@once
def steps_of_one(more: str) -> tuple[list[tuple[float, ...]], dict[str, torch.Tensor]]:
    """Returns κ of three steps of one process, and the state after them; fields beside OWN as JSON."""
    one = alone(lambda: tiny("llama", False), {**OWN, **json.loads(more)})
    kappas = [one.step(ragged(7, step)).kappa for step in range(3)]
    return kappas, {key: packed.data for key, packed in one.method.state.items()}


@once
def weights_of_the_oracle(method: str, steps: int) -> dict[str, torch.Tensor]:
    fields = {**OWN, "method": method, **ORACLE[method]}
    return oracle(tiny("gpt2", False), ragged, 7, method, fields, steps)


@case(worlds=(2, 3, 4))
def ranks_make_the_steps_of_one_process(world: World) -> None:
    for more in (
        {"branch_chunk": 3}, {"micro_batch": 2}, {"method": "lozo", "difference": "forward"},
        {"method": "tezo-adam-coef", "normalize": "std", "train_vectors": True},
    ):  # fmt: skip
        kappas, end = steps_of_one(json.dumps(more))
        for name, model in sharded(world, lambda: tiny("llama", False)).items():
            engine = tezo_ds.initialize(model, {**OWN, **more})
            engine.objective.first = None
            for step, theirs in enumerate(kappas):
                ours = engine.step(mine(ragged(7, step), world.rank, world.size)).kappa
                assert len(ours) == len(theirs)
                torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=5e-3, msg=f"{name} {more}")
            assert engine.method.state.keys() == end.keys()
            for key, expected in end.items():
                state, scale = engine.method.state[key].data, expected.abs().max().item()
                torch.testing.assert_close(state, expected, rtol=1e-2, atol=1e-2 * scale)
                assert_equal_on_all_ranks(state)
            engine.check()


@case(worlds=(2, 3))
def every_method_is_the_oracle(world: World) -> None:
    steps = 4
    for method, more in ORACLE.items():
        fields = {**OWN, "method": method, **more}
        plain = tiny("gpt2", False)
        models = {"zero3": zero3.wrap(deepcopy(plain), ZERO3), "fsdp2": shard(deepcopy(plain))}
        for name, model in models.items():
            engine = tezo_ds.initialize(model, fields)
            for step in range(steps):
                engine.step(mine(ragged(7, step), world.rank, world.size))
            before, merged = plain.state_dict(), engine.state_dict()
            expected = weights_of_the_oracle(method, steps) if merged else {}
            for key, weight in expected.items():
                change = weight - before[key]
                scale = change.abs().max().item()
                off = (merged[key].double() - before[key] - change).abs().max().item()
                assert scale > 1e-4 and off < 0.03 * scale, f"{method}, {name}, {key}: off by {off}"


@case(worlds=(4,))
def copies_of_the_weights_and_split_columns_are_one_process(world: World) -> None:
    for way in WAYS:
        if way.name not in ("ZeRO-3, hpZ", "FSDP2, hybrid", "FSDP2 over tensor parallelism"):
            continue
        model, config = way.model(world)
        engine = tezo_ds.initialize(model, {**config, "tezo": OWN} if config else OWN)
        one = alone(lambda: WAYS[0].model(world)[0], OWN)
        for step in range(2):
            batch = ragged(7, step)
            share = mine(batch, engine.sharding.rank, world.size // way.share)
            ours, theirs = engine.step(share).kappa, one.step(batch).kappa
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=5e-3, msg=way.name)
        assert_equal_on_all_ranks(engine.method.coefficients)
        engine.check()


@case(worlds=(2, 3, 4))
def both_ways_to_sum_give_the_same_bits_with_unequal_shares(world: World) -> None:
    """Whether ranks add up their own sums is decided alike where they have unlike numbers of examples: at the
    second limit only some of them would by their own counts, and the others would wait for ever."""
    found, sent = [], []
    few = tezo_ds.initialize(tiny(), OWN).space.numel
    for limit in (0, 6 * few, 1 << 40):
        with mock.patch.object(engine_module, "SHARED_FROM", limit):
            engine = tezo_ds.initialize(tiny(), {**OWN, "method": "tezo-adam-coef"})
            engine.objective.first = None
            with recorded_collectives() as calls:
                for step in range(2):
                    engine.step(mine(ragged(7, step), world.rank, world.size))
        found.append(engine.method.coefficients)
        sent.append(sum(nbytes for _, nbytes in calls))
        assert_equal_on_all_ranks(engine.method.coefficients)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]) and found[0].any()
    rows = len(labelled(ragged(7)))
    scalars = 2 * (8 * world.size + 16 * 4 * rows + 8)
    assert [sent[2], sent[0]] == [scalars, scalars + 2 * 8 * few], (sent, scalars, few)


@case(worlds=(2, 3))
def a_cached_trunk_gives_the_steps_without(world: World) -> None:
    def last(model: nn.Module, cache: str) -> tuple[tuple[float, ...], torch.Tensor]:
        fields = {"placement": "per_example", "branch_chunk": 3, "micro_batch": 2}
        engine = engine_of(model, **fields, trunk_cache=cache)
        for rows in VISITS:
            batch = part_of(numbered(list(rows)), world.rank, world.size)
            report = engine.step(batch)
        return report.kappa, engine.method.coefficients

    without, _ = last(deep("llama", False), "off")
    for name, model in sharded(world, lambda: deep("llama", False)).items():
        kappa, coefficients = last(model, "memory")
        torch.testing.assert_close(kappa, without, rtol=1e-2, atol=5e-3, msg=name)
        assert_equal_on_all_ranks(coefficients)


@case(worlds=(2,))
def an_example_that_fails_on_one_rank_is_dropped_on_all(world: World) -> None:
    def failing(outputs: object, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        loss = outputs.logits.float().square().mean(dim=(1, 2)).clone()  # type: ignore[attr-defined]
        if world.rank == 1:
            loss[len(loss) // 4] = math.nan  # in the second branch of four, its first example
        return loss, torch.ones(loss.numel())

    engine = tezo_ds.initialize(tiny(), OWN, failing)
    batch = {k: v for k, v in ragged(7).items() if k != "labels"}
    report = engine.step(mine(batch, world.rank, 2))
    assert [q for q, kappa in enumerate(report.kappa) if math.isnan(kappa)] == [10]
    assert_equal_on_all_ranks(engine.method.coefficients)
    assert engine.method.coefficients.any()
