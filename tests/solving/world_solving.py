"""tezo-gn over sharded weights: the oracle's steps, by a message of Q² + Q + 1 numbers."""

from __future__ import annotations

import torch
import world_fsdp2
from test_steps import CHOICES, FIELDS, STEPS, assert_the_oracles, batch_of, expected, with_biases
from tiny import part_of, tiny
from traffic import Traffic
from world_replicated import assert_equal_on_all_ranks
from world_zero3 import ZERO3
from worlds import World, case

import tezo_ds
from tezo_ds.output_layer.term import BIAS
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
        sent = sent_by(engine, world)
        assert_equal_on_all_ranks(engine.method.coefficients)
        if world.size > 1:
            assert_messages(sent, directions=(4, 5), biases=0)
        if merged := engine.state_dict():
            exact = next(iter(merged.values())).dtype == torch.float64
            wide = {name: tensor.double() for name, tensor in merged.items()}
            assert_the_oracles(wide, 1e-5 if exact else 2e-2)
    biased = with_biases(
        tezo_ds.initialize(world_fsdp2.shard(tiny("llama", tied=False).double()), FIELDS)
    )
    biased.objective.first = None
    sent = sent_by(biased, world)
    if world.size > 1:
        assert_messages(sent, directions=(4, 5), biases=len(CHOICES))
    biases = biased.output_layer.state[BIAS].double()
    torch.testing.assert_close(biases, expected(True, len(CHOICES))[1], rtol=0, atol=1e-5)


def sent_by(engine: tezo_ds.Engine, world: World) -> list[list[int]]:
    """Makes the steps; returns the bytes of each all-reduce of each."""
    sent = []
    for step in range(STEPS):
        with Traffic() as traffic:
            engine.step(part_of(batch_of(step), world.rank, world.size))
        sent.append([c.nbytes for c in traffic.calls if "allreduce" in c.op])
    return sent


def assert_messages(sent: list[list[int]], directions: tuple[int, ...], biases: int) -> None:
    """Asserts that steps send losses, what is solved by, and losses of the scales where there is a step."""
    allowed = []
    for drawn in directions:  # without the last step's, and with it
        columns = drawn + biases
        losses, solution, scales = 32 * drawn + 8, 8 * (columns**2 + columns + 1), 16 * 4
        allowed += [[losses, solution, scales], [losses, solution]]
    assert all(step in allowed for step in sent) and allowed[-2] in sent
