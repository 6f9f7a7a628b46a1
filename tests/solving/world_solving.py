"""tezo-gn over sharded weights: the oracle's steps, by a message of Q² + Q + 1 numbers."""

from __future__ import annotations

import torch
import world_fsdp2
from test_steps import FIELDS, STEPS, assert_the_oracles, batch_of
from tiny import part_of, tiny
from traffic import Traffic
from world_replicated import assert_equal_on_all_ranks
from world_zero3 import ZERO3
from worlds import World, case

import tezo_ds
from tezo_ds.sharding import zero3


@case(worlds=(1, 2, 3))
def solved_steps_are_the_oracles(world: World) -> None:
    whole = tiny("llama", tied=False)
    for model in (
        zero3.wrap(tiny("llama", tied=False), dict(ZERO3)),  # which takes no float64
        world_fsdp2.shard(tiny("llama", tied=False).double()),
        whole.double(),
    ):
        engine = tezo_ds.initialize(model, FIELDS)
        engine.objective.first = None  # which compares losses, once a run
        sent = []
        for step in range(STEPS):
            with Traffic() as traffic:
                engine.step(part_of(batch_of(step), world.rank, world.size))
            sent.append([c.nbytes for c in traffic.calls if "allreduce" in c.op])
        assert_equal_on_all_ranks(engine.method.coefficients)
        if world.size > 1:  # losses, the solution, and scales where there is a step
            losses, solution, scales = 16 * 8 + 8, 8 * (16 + 4 + 1), 16 * 4
            assert [losses, solution, scales] in sent
            assert all(step in ([losses, solution, scales], [losses, solution]) for step in sent)
        if merged := engine.state_dict():
            exact = next(iter(merged.values())).dtype == torch.float64
            wide = {name: tensor.double() for name, tensor in merged.items()}
            assert_the_oracles(wide, 1e-5 if exact else 2e-2)
