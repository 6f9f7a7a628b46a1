"""Layers probed on several ranks: one process's table, the same bits everywhere, and runs that choose."""

from __future__ import annotations

import json
from collections.abc import Callable
from unittest import mock

import torch.distributed as dist
import world_fsdp2
import world_fsdp_runs
from command_line import Run, flags
from deep import data, deep
from once import once
from tiny import part_of
from torch import Tensor, nn
from traffic import Traffic
from world_replicated import assert_equal_on_all_ranks
from world_zero3 import ZERO3
from worlds import World, case

import tezo_ds
from tezo_ds.probing_layers import files
from tezo_ds.probing_layers.measure import Asked, Measured, measure
from tezo_ds.probing_layers.names import bands_of
from tezo_ds.sharding import zero3
from tezo_ds.training import include_auto, layers_probe

EXAMPLES, COLUMNS = 7, 2


def probed(model: nn.Module, rank: int, size: int) -> list[Measured]:
    """Measures this rank's share of the examples, in batches of two, as many on every rank."""
    engine = tezo_ds.initialize(model, {"rank": 3, "seed": 5, "include": ["*layers*"]})
    names = [name for name, _ in engine.sharding.module.named_parameters()]
    mine, first = (
        part_of(data(EXAMPLES), rank, size),
        sum(len(data(EXAMPLES)["labels"].tensor_split(size)[r]) for r in range(rank)),
    )
    batches = []
    for start in range(0, -(-EXAMPLES // size), 2):
        batches.append((some(mine, start), first + start))
    bands = bands_of(engine.space.matrices, names, 2)
    asked = Asked(bands, 5, batches, EXAMPLES, COLUMNS, 2e-3, 5)
    return measure(engine.sharding, engine.objective, asked)


@once
def probed_alone() -> list[Measured]:
    """Measures all examples in one process."""
    return probed(deep(), 0, 1)


def some(mine: dict[str, Tensor], start: int) -> dict[str, Tensor]:
    """Returns two of this rank's examples, or one without labels where they have run out."""
    part = {key: value[start : start + 2] for key, value in mine.items()}
    if len(part["labels"]):
        return part
    return {**{k: v[:1] for k, v in mine.items()}, "labels": mine["labels"][:1] * 0 - 100}


def ways() -> dict[str, Callable[[], nn.Module]]:
    return {
        "replicated": deep,
        "zero3": lambda: zero3.wrap(deep(), ZERO3),
        "fsdp2": lambda: world_fsdp2.shard(deep()),
    }


@case(worlds=(1, 2, 3))
def every_sharding_finds_the_table_of_one_process(world: World) -> None:
    expected = probed_alone()
    assert len(expected) == 14
    for name, make in ways().items():
        found = probed(make(), world.rank, world.size)
        for one, theirs in zip(found, expected, strict=True):
            assert [m.name for m in one.group] == [m.name for m in theirs.group]
            assert one.slopes.shape == (EXAMPLES, COLUMNS)
            for ours, its in ((one.slopes, theirs.slopes), (one.bends, theirs.bends)):
                assert_equal_on_all_ranks(ours)
                close = 0.01 if ours is one.slopes else 0.1
                assert float((ours - its).norm() / its.norm()) < close, (name, one.group[0].name)


@case(worlds=(2,))
def a_band_sends_one_message(world: World) -> None:
    with Traffic() as traffic:
        probed(deep(), world.rank, world.size)
    sizes = [call.nbytes for call in traffic.calls if not call.gathers]
    assert sizes.count(16 * EXAMPLES * COLUMNS * 7) == 2 and 8 * EXAMPLES in sizes


@case(worlds=(2,), bits=True)
def runs_choose_the_same_on_all_ranks_and_go_on_with_it(world: World) -> None:
    """Runs by the command line under FSDP2 and ZeRO-3: probed once, resumed and found again."""
    given, config = world_fsdp_runs.given_to(world), world.folder / "probing-zero3.json"
    if world.rank == 0:
        config.write_text(json.dumps({**ZERO3, "tezo": {}}))
    dist.barrier()
    options = {"include": "auto", "output_layer": "bias", "objective": "choices"}
    options["train_examples"] = 9
    words = {"fsdp": ["--fsdp"], "zero3": ["--deepspeed", str(config)]}
    for name, switches in words.items():
        folder = world.folder / f"probing-{name}"
        second = mock.patch.object(layers_probe, "choose", lambda sets: sets[1])
        with second, mock.patch.object(files, "draw"):
            out = world_fsdp_runs.call(*given.train(folder, steps=2, **options), *switches)
        if world.rank == 0:
            assert "include auto: recommended" in out
        again = mock.patch.object(include_auto, "probe_layers", side_effect=AssertionError("again"))
        with again:
            world_fsdp_runs.call(*given.train(folder, steps=4, **options), *switches)
            out = world_fsdp_runs.call("evaluate", "--run", folder, *switches)
        run = Run(folder)
        assert len(run.config["ranks"]) == 2 and set(run.coefficients) == set(run.config["ranks"])
        if world.rank == 0:
            assert json.loads(out)["accuracy"] == run.summary["accuracy_after"]


@case(worlds=(2,))
def the_command_prints_on_one_rank(world: World) -> None:
    given, config = world_fsdp_runs.given_to(world), world.folder / "command-zero3.json"
    if world.rank == 0:
        config.write_text(json.dumps({**ZERO3, "tezo": {"rank": 4}}))
    dist.barrier()
    for switches in (["--fsdp"], ["--deepspeed", str(config)]):
        words = flags({"examples": 9, "objective": "choices", "json": True, "together": 2})
        out = world_fsdp_runs.call("probe-layers", *given.task(), *words, *switches)
        assert (out == "") == (world.rank > 0)
        if world.rank == 0:
            assert len(json.loads(out)["groups"]) == 8
