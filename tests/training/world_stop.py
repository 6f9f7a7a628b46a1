"""A stop that one rank is asked for: every rank stops after the same step."""

from __future__ import annotations

from tiny import make_batch, part_of
from world_directions import OWN
from world_everywhere import FIELDS, WAYS
from worlds import World, case

import tezo_ds

STEPS, ASKED = 5, 2  # steps taken, and before which of them the last rank is asked


def stopping(engine: tezo_ds.Engine, world: World) -> list[bool]:
    """Returns, for each step, whether its report says that the run stops."""
    found, sharding = [], engine.sharding
    for step in range(STEPS):
        if step == ASKED and world.rank == world.size - 1:
            engine.ask_to_stop()
        share = part_of(make_batch(7, seed=step), sharding.rank, sharding.world_size)
        found.append(engine.step(share).stopping)
    return found


@case(worlds=(1, 2, 3, 4))
def all_ranks_stop_after_the_same_step(world: World) -> None:
    expected = [step >= ASKED for step in range(STEPS)]
    for way in (way for way in WAYS if world.size in way.ranks):
        assert stopping(way.engine(world, "fused"), world) == expected, way.name
    model, config = WAYS[1].model(world)
    engine = tezo_ds.initialize(model, {**config, "tezo": OWN})  # a row of losses for each rank
    assert stopping(engine, world) == expected


@case(worlds=(4,))
def without_the_word_to_the_whole_world_tensor_parallel_ranks_would_go_on(world: World) -> None:
    """Hazard: the last rank's losses are summed over its data group alone, ranks 1 and 3."""
    way = next(way for way in WAYS if way.share > 1)
    model, _ = way.model(world)
    engine = tezo_ds.initialize(model, FIELDS)
    engine.sharding.everyone = engine.sharding.world_size  # as if these were all
    told = world.rank % 2 == 1
    assert stopping(engine, world) == [told and step >= ASKED for step in range(STEPS)]
