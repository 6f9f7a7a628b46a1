"""`rho: auto` on several ranks: one choice for all, however the examples are split."""

from __future__ import annotations

import torch
from radius_losses import Losses
from tiny import make_batch, part_of
from world_everywhere import WAYS, Model
from world_replicated import assert_equal_on_all_ranks
from worlds import World, case

import tezo_ds
from tezo_ds.radius import choose_rho

FIELDS = {"rank": 3, "seed": 11}


@case(worlds=(2, 3))
def all_ranks_choose_the_same_radius(world: World) -> None:
    for way in (way for way in WAYS if way.name in ("replicated", "ZeRO-3", "FSDP2")):
        model, config = way.model(world)
        engine = tezo_ds.initialize(model, {**config, "tezo": FIELDS} if config else FIELDS)
        share = part_of(make_batch(7), world.rank, world.size)
        rho = choose_rho(Losses(engine, share), torch.float32).rho
        assert_equal_on_all_ranks(torch.tensor(rho, dtype=torch.float64))
        one = tezo_ds.initialize(Model(), FIELDS)
        alone = choose_rho(Losses(one, make_batch(7), own=True), torch.float32).rho
        assert alone / 5 < rho < 5 * alone
        assert engine.step(share).kappa[0] != 0


@case(worlds=(2, 3))
def by_its_own_losses_each_rank_would_choose_another(world: World) -> None:
    engine = tezo_ds.initialize(Model(), FIELDS)
    share = part_of(make_batch(7), world.rank, world.size)
    rho = choose_rho(Losses(engine, share, own=True), torch.float32).rho
    assert len(set(engine.sharding.gather(rho))) == world.size
