"""`rho: auto` on several ranks: one choice for all, however the examples are split."""

from __future__ import annotations

import torch
from radius_losses import Losses
from tiny import make_batch, part_of
from world_everywhere import WAYS, Model
from world_replicated import assert_equal_on_all_ranks
from worlds import World, case

import tezo_ds
from tezo_ds.auto.radius import choose_rho

FIELDS = {"rank": 3, "seed": 11, "lr": 1e-4}
AUTO = {**FIELDS, "rho": "auto"}


@case(worlds=(2, 3))
def all_ranks_choose_the_same_radius(world: World) -> None:
    one = tezo_ds.initialize(Model(), AUTO)
    one.measuring._sharding.all_reduce = lambda sums: sums  # alone with all examples
    alone = one.step(make_batch(7)).rho
    share = part_of(make_batch(7), world.rank, world.size)
    fields = {**AUTO, "placement": "shared" if world.size == 2 else "per_rank"}
    for way in (way for way in WAYS if way.name in ("replicated", "ZeRO-3", "FSDP2")):
        model, config = way.model(world)
        engine = tezo_ds.initialize(model, {**config, "tezo": fields} if config else fields)
        reports = [engine.step(share) for _ in range(3)]
        rho = reports[0].rho
        assert_equal_on_all_ranks(torch.tensor(rho, dtype=torch.float64))
        assert [report.rho for report in reports] == [rho] * 3
        assert alone / 5 < rho < 5 * alone
        # A run that is told this radius is the same run.
        model, config = way.model(world)
        told = {**fields, "rho": rho}
        again = tezo_ds.initialize(model, {**config, "tezo": told} if config else told)
        assert [again.step(share).kappa for _ in range(3)] == [r.kappa for r in reports]


@case(worlds=(2, 3))
def by_its_own_losses_each_rank_would_choose_another(world: World) -> None:
    engine = tezo_ds.initialize(Model(), FIELDS)
    share = part_of(make_batch(7), world.rank, world.size)
    rho = choose_rho(Losses(engine, share, own=True), torch.float32).rho
    assert len(set(engine.sharding.gather(rho))) == world.size
