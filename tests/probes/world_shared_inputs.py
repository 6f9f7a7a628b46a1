"""Layers that read one tensor: on every sharding they share a product, from the first loss on."""

from __future__ import annotations

from unittest import mock

import torch
from tiny import make_batch, part_of, tiny
from torch.distributed.fsdp import MixedPrecisionPolicy
from trained import shared
from world_fsdp2 import shard
from world_hazards import PERSISTENT
from world_zero3 import sharded
from worlds import World, case

import tezo_ds
from tezo_ds.probes import sites

BLOCK = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]
FIELDS = {"rank": 3, "rho": 1e-2, "seed": 3}


@case(worlds=(1, 2, 3), bits=True)
def layers_share_products_on_every_sharding(world: World) -> None:
    batch, losses = part_of(make_batch(7), world.rank, world.size), []
    mixed = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    for make in (
        lambda: tezo_ds.initialize(tiny(), FIELDS),
        lambda: sharded(fields=FIELDS),
        lambda: sharded(fields=FIELDS, zero=PERSISTENT),
        lambda: tezo_ds.initialize(shard(tiny()), FIELDS),
        lambda: tezo_ds.initialize(shard(tiny(), **mixed), FIELDS),
    ):
        engine = make()
        engine.method.coefficients.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
        losses.append([engine.loss(batch) for _ in range(3)])
        with mock.patch.object(sites, "scaled", side_effect=sites.scaled) as made:
            losses[-1].append(engine.loss(batch))
        assert shared(engine) == BLOCK * 2, type(engine.sharding)
        # Each group's once: 2 blocks of (q, k, v) and (gate, up), beside layers that share none.
        widths = [len(call.args[1]) for call in made.call_args_list]
        assert widths.count(9) == widths.count(6) == 2, (type(engine.sharding), widths)
        assert len(set(losses[-1])) == 1
    assert len({found[0] for found in losses[:4]}) == 1, "whole weights are whole weights"
