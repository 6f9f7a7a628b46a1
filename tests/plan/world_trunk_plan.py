"""Predictions of `tezo-ds plan` for late layers alone, beside what real ranks gather."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import world_fsdp2
from traffic import Traffic
from world_plan import LABELS, LENGTH, TIGHT, job_of, small
from worlds import World, case

import tezo_ds
from tezo_ds.config import TezoConfig
from tezo_ds.plan import traffic
from tezo_ds.plan.absent_zero3 import config_of
from tezo_ds.plan.job import Job, Sharded
from tezo_ds.sharding import zero3
from tezo_ds.trunk.cache import Budget, MemoryCache

BOTH, CACHED = (False, True), (True,)  # whether the trunk is cached
WAYS: tuple[tuple[str, Sharded, bool, dict[str, Any], tuple[bool, ...]], ...] = (
    ("llama", "fsdp2", False, {}, BOTH),
    ("llama", "fsdp2", False, {"branch_chunk": 1}, CACHED),
    ("llama", "fsdp2", False, {"probe": "inplace"}, CACHED),
    ("llama", "fsdp2", False, {"micro_batch": 2}, CACHED),
    ("llama", "zero3", False, {}, CACHED),
    ("llama", "zero3", True, {}, BOTH),
    ("opt", "zero3", True, {}, BOTH),
)


def moved(job: Job, kind: str) -> Traffic:
    """Records a fifth step on the same examples."""
    ids = torch.arange(job.examples * LENGTH).view(job.examples, LENGTH) % 300
    labels = ids.clone()
    labels[:, :-LABELS] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    model = small(kind)
    sharded = world_fsdp2.shard(model) if job.layout.by_rows else zero3.wrap(model, config_of(job))
    engine = tezo_ds.initialize(sharded, job.config)
    engine.settle(batch)
    assert engine.objective.trunk is not None
    if job.cached:
        engine.objective.trunk.cache = MemoryCache(Budget(None), pinned=False)
        batch["example_ids"] = torch.arange(job.examples)
    for _ in range(5):
        with Traffic() as found:
            engine.step(batch)
    return found


@case(worlds=(2,))
def a_plan_of_late_layers_is_what_ranks_gather(world: World) -> None:
    for kind, sharding, tight, fields, trunks in WAYS:
        chosen = {"rank": 3, "queries": 2, "rho": 1e-2, "include": ("last:1",), **fields}
        for cached in trunks:
            config = TezoConfig(**chosen, trunk_cache="memory" if cached else "off")
            job = replace(job_of(kind, sharding, world.size, world.size, config), cached=cached)
            job = replace(job, limits=TIGHT) if tight else job
            predicted, found = traffic.engine(job), moved(job, kind)
            gathers = [call.nbytes for call in found.calls if call.gathers]
            where = (kind, sharding, tight, fields, cached)
            if not config.micro_batch:  # by which ranks also agree on the number of parts
                own = [call.nbytes for call in found.calls if not call.gathers]
                assert own == list(predicted.scalars), where
            assert len(gathers) == predicted.collectives, where
            # What both passes need, as OPT's embedding of positions, ZeRO-3 may gather twice.
            twice = 0.02 if tight and kind == "opt" else 0
            assert sum(gathers) == pytest.approx(predicted.total, rel=twice, abs=0), where
