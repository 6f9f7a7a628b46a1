"""The scaling benchmark on every way of sharding: what it counts, and what its parts measure."""

from __future__ import annotations

from argparse import Namespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from parts.scaling.measure import SHARDINGS, gathered, load, measure, misfit, timed_steps
from parts.scaling.split import PARTS, Split
from scaling import random_model
from step_overhead import make_batch, random_llama
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import World, case

from tezo_ds.config import resolve
from tezo_ds.engine.engine import Engine

HIDDEN, LAYERS = 128, 1


def settings(**more: object) -> Namespace:
    """Returns settings like the command line's; 30 tokens, so that nothing divides."""
    given = {
        "model": random_model(HIDDEN, LAYERS, "float32"), "name": "tiny", "dtype": "float32",
        "length": 30, "queries": 2, "rank": 3, "steps": 2, "discard": 2, "threads": 1, "batch_size": 1,
        "global_batch": 4, "probes": ["fused", "inplace"], "modes": ["weak", "strong"],
        "include": ["*"],
    }  # fmt: skip
    return Namespace(**{**given, **more})


class Gathers(TorchDispatchMode):
    """A clock that goes on by a second at each all-gather, and stands still otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace and "allgather" in str(func).replace("all_gather", "allgather"):
            self.count += 1
        return func(*args, **(kwargs or {}))


@case(worlds=(4,))
def a_world_is_measured_on_every_sharding(world: World) -> None:
    weights = sum(p.numel() * p.itemsize for p in random_llama(HIDDEN, LAYERS).parameters())
    for sharding in SHARDINGS:
        records = measure(sharding, settings())
        assert records == gathered(records)[0], "the same on all ranks"
        assert [(r["probe"], r["mode"]) for r in records] == [
            ("fused", "weak"), ("fused", "strong"), ("inplace", "weak"), ("inplace", "strong"),
        ]  # fmt: skip
        fused, same, inplace, _ = records
        assert same == {**fused, "mode": "strong"}, "four examples of four ranks are one of each"
        hybrid = sharding in ("zero3-hpz", "fsdp2-hybrid")
        assert fused["gather_ranks"] == (2 if hybrid else 4)
        for record in (fused, inplace):
            assert record["our_calls"] == 1 and record["our_bytes"] == 16 * 4 + 8
            times = 1 if record["probe"] == "fused" else 4
            assert times * weights <= record["gather_bytes"] <= 1.01 * times * weights
            parts = sum(record[f"{part}_s"] for part in PARTS)
            assert 0.5 * record["step_s"] < parts <= 1.01 * record["step_s"]
            assert record["step_s_low"] <= record["step_s"] <= record["step_s_high"]
            assert record["gathers_alone_s"] > 0 and record["gather_s"] > 0
        assert fused["perturb_s"] == 0 < inplace["perturb_s"]
        # Shards and what is gathered, which DeepSpeed copies once; in place a copy of the shards as well.
        held = weights / (2 if hybrid else 4) + (weights / 4 if sharding == "zero3-hpz" else 0)
        assert held + 0.3 * weights < fused["peak_bytes"] < held + 2.5 * weights, fused
        assert 1.9 * held + 0.3 * weights < inplace["peak_bytes"], inplace


@case(worlds=(2,))
def all_gathers_are_in_the_gathers_part(world: World) -> None:
    for sharding in ("zero3", "fsdp2"):
        weights = load(sharding, settings().model, "float32", 1)
        for probe, times in (("fused", 1), ("inplace", 2)):
            config, _ = resolve({"rank": 3, "lr": 1e-9, "probe": probe})
            engine, batch = Engine(weights, config, None), make_batch("2x30", 1024, "last")
            for _ in range(2):
                engine.step(batch)
            with Gathers() as clock, mock.patch.object(Split, "_mark", lambda _: clock.count):
                (found,) = timed_steps(engine, batch, 1)
            assert found["gather"] == found["step"] == clock.count >= times
            with mock.patch.object(Split, "_mark", side_effect=AssertionError("still timed")):
                engine.step(batch)


@case(worlds=(3,))
def a_world_that_cannot_hold_copies_is_named(world: World) -> None:
    for sharding in SHARDINGS:
        assert (misfit(sharding, dist.get_world_size()) is None) == (sharding in ("zero3", "fsdp2"))
    assert torch.tensor(gathered(world.rank)).tolist() == [0, 1, 2]
