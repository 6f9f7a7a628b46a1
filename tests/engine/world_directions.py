"""Directions of each rank's own: the run does not depend on which rank measured what."""

from __future__ import annotations

import json
import math
from unittest import mock

import torch
from once import once
from tiny import make_batch, part_of, tiny
from world_everywhere import WAYS, Model
from world_fsdp2 import shard
from world_replicated import FIELDS, assert_equal_on_all_ranks, recorded_collectives
from worlds import World, case

import tezo_ds
from tezo_ds.engine import engine as engine_module

QUERIES = 2
OWN = {"rank": 3, "rho": 1e-2, "lr": 3e-4, "seed": 11, "placement": "per_rank", "queries": QUERIES}


def alone(queries: int, method: str, **more: object) -> tezo_ds.Engine:
    fields = {**OWN, "placement": "shared", "queries": queries, "method": method, **more}
    engine = tezo_ds.initialize(Model(), fields)
    engine.sharding.world_size = 1
    return engine


@once
def steps_of_one(
    queries: int, method: str, more: str
) -> tuple[list[tuple[float, ...]], dict[str, torch.Tensor]]:
    """Returns κ of three steps of one process, and the state after them; further fields as JSON."""
    one = alone(queries, method, **json.loads(more))
    kappas = [one.step(make_batch(5, seed=step)).kappa for step in range(3)]
    return kappas, {name: packed.data for name, packed in one.method.state.items()}


@case(worlds=(2, 4))
def two_queries_on_each_rank_are_as_many_on_one(world: World) -> None:
    for way in (way for way in WAYS if world.size in way.ranks):
        data = world.size // way.share
        for method, difference in (
            ("tezo-m", "central"),
            ("lozo", "forward"),
            ("tezo-adam", "central"),
        ):
            if world.size == 4 and method != "tezo-adam":
                continue  # the others were seen on fewer ranks
            more = {"difference": difference, "branch_chunk": 3}
            model, config = way.model(world)
            fields = {**OWN, "method": method, **more}
            engine = tezo_ds.initialize(model, {**config, "tezo": fields} if config else fields)
            kappas, end = steps_of_one(QUERIES * data, method, json.dumps(more))
            for step, theirs in enumerate(kappas):
                ours = engine.step(
                    make_batch(5, seed=step)
                ).kappa  # the same examples on every rank
                torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=5e-3)
                assert len(set(ours)) == QUERIES * data
            state = {name: packed.data for name, packed in engine.method.state.items()}
            assert state.keys() == end.keys()
            for name, expected in end.items():
                scale = expected.abs().max().item()
                torch.testing.assert_close(state[name], expected, rtol=1e-2, atol=1e-2 * scale)
                assert_equal_on_all_ranks(state[name])
            engine.check()


@case(worlds=(2, 3))
def each_rank_measures_on_its_own_data(world: World) -> None:
    engine = tezo_ds.initialize(Model(), OWN)
    batch = make_batch(7, seed=1)
    share = part_of(batch, world.rank, world.size)
    found = engine.step(share).kappa
    for rank in range(world.size):
        one = alone(QUERIES * world.size, "tezo")
        theirs = one.step(part_of(batch, rank, world.size)).kappa
        mine = slice(rank * QUERIES, (rank + 1) * QUERIES)
        torch.testing.assert_close(found[mine], theirs[mine], rtol=1e-2, atol=5e-3)


@case(worlds=(2, 3))
def both_ways_to_sum_give_the_same_bits(world: World) -> None:
    found, sent = [], []
    for limit in (0, 1 << 40):
        with mock.patch.object(engine_module, "SHARED_FROM", limit):
            engine = tezo_ds.initialize(Model(), {**OWN, "method": "tezo-adam-coef"})
            with recorded_collectives() as calls:
                for step in range(3):
                    engine.step(make_batch(3, seed=step + world.rank))
        found.append(engine.method.coefficients)
        sent.append(sum(nbytes for _, nbytes in calls))
        assert_equal_on_all_ranks(engine.method.coefficients)
    assert torch.equal(*found) and bool(found[0].any())
    # The last for what the first batch is looked at for, once.
    scalars = 3 * (16 * 2 * QUERIES * world.size + 8) + 2 * 8
    assert sent == [scalars + 3 * 8 * engine.space.numel, scalars]


@case(worlds=(2,))
def a_direction_that_fails_on_one_rank_is_dropped_on_all(world: World) -> None:
    def failing(outputs: object, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        loss = outputs.logits.float().square().mean(dim=(1, 2)).view(4, -1).clone()
        if world.rank == 1:
            loss[2] = math.nan  # + of its second direction
        return loss.flatten(), torch.ones(loss.numel())

    for placement, lost in (("shared", {1}), ("per_rank", {3})):
        fields = {**FIELDS, "placement": placement, "queries": QUERIES}
        engine = tezo_ds.initialize(tiny(), fields, failing)
        report = engine.step(part_of(make_batch(5), world.rank, world.size))
        assert {q for q, kappa in enumerate(report.kappa) if math.isnan(kappa)} == lost
        assert report.dropped == 1
        assert_equal_on_all_ranks(engine.method.coefficients)
        assert engine.method.coefficients.any()


@case(worlds=(2, 3))
def ranks_may_have_unequal_numbers_of_micro_batches(world: World) -> None:
    for way in (way for way in WAYS if way.name in ("replicated", "ZeRO-3", "FSDP2")):
        if world.size not in way.ranks:
            continue
        model, config = way.model(world)
        fields = {**OWN, "placement": "shared", "micro_batch": 2}
        engine = tezo_ds.initialize(model, {**config, "tezo": fields} if config else fields)
        one = alone(QUERIES, "tezo")
        for step in range(3):
            batch = make_batch(8, seed=step)
            cuts = [0, 1, 4, 8] if world.size == 3 else [0, 3, 8]
            mine = {k: v[cuts[world.rank] : cuts[world.rank + 1]] for k, v in batch.items()}
            torch.testing.assert_close(
                engine.step(mine).kappa, one.step(batch).kappa, rtol=1e-2, atol=5e-3
            )


@case(worlds=(2, 3))
def ranks_with_unequal_batches_make_as_many_forwards_within_a_budget(world: World) -> None:
    forwards = []
    for share in (1, world.rank + 1):
        fields = {**OWN, "queries": 8, "memory_budget": 2e-3}
        engine = tezo_ds.initialize(shard(Model()), fields)
        calls = mock.Mock(side_effect=engine.sharding.forward)
        with mock.patch.object(engine.sharding, "forward", calls):
            for step in range(3):
                engine.step(make_batch(4 * share, seed=step, length=30))
        forwards.append(calls.call_count)
        everyone = engine.sharding.maxima([calls.call_count, -calls.call_count])
        assert everyone[0] == -everyone[1]
    assert 3 < forwards[0] < forwards[1]
