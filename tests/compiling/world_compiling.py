"""Compiled blocks on sharded weights: FSDP2's gathers stay outside of graphs; ZeRO-3 says that it cannot."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from tiny import make_batch, part_of
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import MixedPrecisionPolicy
from world_fsdp2 import sharded as fsdp2
from world_zero3 import sharded as zero3
from worlds import World, case

import tezo_ds
from tezo_ds.compiling import blocks

FIELDS = {"rank": 3, "rho": 1e-2, "lr": 1e-4, "queries": 2}


def losses(engine: tezo_ds.Engine, world: World, evaluations: bool = True) -> list[float]:
    """Returns losses of some steps, and of an evaluation after each."""
    found = []
    for seed in range(3):
        batch = part_of(make_batch(7 + seed, seed=seed), world.rank, world.size)
        found.append(engine.step(batch).loss)
        if evaluations:
            found.append(engine.loss(batch))
    return found


@case(worlds=(2,))
def fsdp2_blocks_compile(world: World) -> None:
    counter = CompileCounter()
    with mock.patch.object(blocks, "BACKEND", counter):
        ours = losses(fsdp2("opt", fields={**FIELDS, "compile": True}), world, evaluations=False)
    expected = losses(fsdp2("opt", fields=FIELDS), world, evaluations=False)
    assert ours == pytest.approx(expected, rel=1e-5)
    assert counter.frame_count == 1


@case(worlds=(1, 2))
def fsdp2_twins_are_their_blocks(world: World) -> None:
    calls: list[int] = []

    def noted(*given: Any) -> Any:
        calls.append(1)
        return blocks.run(*given)

    mixed = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    for kind, more, close in (("opt", {}, 1e-5), ("gpt2", {}, 1e-5), ("llama", mixed, 1e-2)):
        with mock.patch.object(blocks, "_compiled", lambda _: noted):
            ours = losses(fsdp2(kind, fields={**FIELDS, "compile": True}, **more), world)
        assert ours == pytest.approx(losses(fsdp2(kind, fields=FIELDS, **more), world), rel=close)
    assert len(calls) == 3 * 6 * 2


@case(worlds=(2,))
def zero3_runs_eagerly_and_says_so(world: World) -> None:
    with mock.patch.object(blocks.log, "warning") as warning:
        engine = zero3(fields={**FIELDS, "compile": True})
    (((text, *words), _),) = warning.call_args_list
    assert "all blocks run eagerly (ZeRO-3 gathers weights by hooks" in text % tuple(words)
    assert losses(engine, world) == losses(zero3(fields=FIELDS), world)
