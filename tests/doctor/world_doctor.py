"""`tezo-ds doctor` on several ranks: content with a sound world, red where one rank is not."""

from __future__ import annotations

import itertools
import socket
import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tiny import tiny
from torch import nn
from torch.distributed import distributed_c10d as c10d
from world_fsdp2 import sharded as sharded_by_rows
from world_fsdp_runs import given_to
from world_zero3 import sharded
from worlds import World, case

from tezo_ds.config import TezoConfig
from tezo_ds.doctor import checks, network, resources, selftest
from tezo_ds.doctor.checks import examine
from tezo_ds.doctor.flags import RunFlags
from tezo_ds.doctor.meeting import Meeting
from tezo_ds.doctor.report import Row
from tezo_ds.plan.needs import Layout, PlannedRun, needs
from tezo_ds.settings import Settings
from tezo_ds.sharding import Sharding, ShardView

ZERO3 = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
ALLOWED = {"green", "yellow", "unchecked"}
_numbers = itertools.count()


def examined(world: World, model: str = "", wait: float = 60, **fields: Any) -> dict[str, Row]:
    """Runs the checks and returns their rows by name, on rank 0; each examination has a part of the store
    to itself."""
    settings = Settings(model=model, task="", fsdp=fields.pop("fsdp", False))
    plan = RunFlags(settings, TezoConfig(rank=3, **fields.pop("tezo", {})), **fields)
    store = dist.PrefixStore(f"doctor {next(_numbers)}", c10d._get_default_store())
    rows = examine(plan, Meeting(store, world.rank, world.size, wait))
    dist.barrier()
    assert bool(rows) == (world.rank == 0)
    return {row.check: row for row in rows}


def assert_row(rows: dict[str, Row], check: str, status: str, *telling: str) -> None:
    if rows:
        row = rows[check]
        assert row.status == status, row
        assert all(words in row.found for words in telling), row


@case(worlds=(2, 3))
def a_doctor_is_content_with_a_sound_world(world: World) -> None:
    folder = world.folder / "doctor"
    ways: list[tuple[str, dict[str, Any]]] = [
        ("ZeRO-3", {"deepspeed": ZERO3, "model": str(given_to(world).model)}),
        ("FSDP2", {"fsdp": True}),
    ]
    for name, way in ways:
        tezo = {"method": "lozo"}  # which writes snapshots
        rows = examined(world, output=folder / "run", tezo=tezo, **way)
        assert all(row.status in ALLOWED for row in rows.values()), rows
        checks = ["ranks", "versions", "reachability", "run folder", "collectives", "self-test"]
        for check in checks + ["model", "memory"] * ("model" in way):
            assert_row(rows, check, "green")
        assert_row(rows, "self-test", "green", name, "fused and inplace probe")
    assert not folder.exists()
    assert not list(world.folder.glob(".tezo-doctor*"))


@case(worlds=(2,))
def a_doctor_sees_other_weights_on_a_rank(world: World) -> None:
    original = selftest.tiny_model

    def bent() -> nn.Module:
        model = original()
        if world.rank == 1:
            with torch.no_grad():
                next(model.parameters()).add_(0.05)
        return model

    with mock.patch.object(selftest, "tiny_model", bent):
        rows = examined(world, fsdp=True)
        assert_row(rows, "self-test", "red", "of those of one process, allowed are")
        rows = examined(world)
        assert_row(rows, "self-test", "red", "weights of", "differ")


@case(worlds=(2,))
def a_doctor_sees_a_rank_that_learns_something_else(world: World) -> None:
    original = selftest.coefficients

    def drifting(*args: Any) -> torch.Tensor:
        return original(*args) + 1e-12 * world.rank

    with mock.patch.object(selftest, "coefficients", drifting):
        assert_row(examined(world), "self-test", "red", "rank 1 learnt something else")


@case(worlds=(3,))
def a_doctor_names_the_pair_that_is_cut_off(world: World) -> None:
    original = network.ping

    def cut(rank: int, address: network.Address) -> float:
        if (world.rank, rank) == (2, 1):
            with socket.create_server(("127.0.0.1", 0)) as gone:
                address = network.Address(*gone.getsockname())
        return original(rank, address)

    start = time.monotonic()
    with mock.patch.object(network, "ping", cut):
        rows = examined(world)
    assert time.monotonic() - start < 20
    assert_row(rows, "reachability", "red", "rank 2 (", ") to rank 1 (", "refused")
    if rows:
        assert "rank 0" not in rows["reachability"].found
    for check in ("bandwidth", "collectives", "self-test"):
        assert_row(rows, check, "unchecked", "reachability")


@case(worlds=(2,))
def a_doctor_waits_for_no_collective_for_ever(world: World) -> None:
    def hang(flags: RunFlags) -> float:
        time.sleep(3 * world.rank)
        return 0.0

    with mock.patch.object(checks, "_joined", hang):
        rows = examined(world, wait=1)
    assert_row(rows, "collectives", "red", "rank 1 (")
    assert_row(rows, "self-test", "unchecked", "collectives")


@case(worlds=(2,))
def a_doctor_sees_that_folders_are_not_shared(world: World) -> None:
    with (
        mock.patch.object(resources, "sees", lambda token: world.rank == 0),
        mock.patch.object(selftest, "run", lambda *_: "not this time"),
    ):
        for method, status in (("lozo", "red"), ("tezo", "green")):
            rows = examined(world, output=world.folder / "apart", tezo={"method": method})
            assert_row(rows, "run folder", status, "rank 1 (", "sees another folder")


@case(worlds=(2, 3))
def needs_are_what_shards_take(world: World) -> None:
    made = {
        Layout(world.size, gathers=True): sharded().sharding,
        Layout(world.size, by_rows=True, gathers=True): sharded_by_rows().sharding,
    }
    for layout, sharding in made.items():
        with torch.device("meta"):
            run = PlannedRun(tiny(), TezoConfig(rank=3), layout)
        predicted = needs(run).shard
        assert predicted >= max(sharding.maxima([_held(sharding)])) > 0.99 * predicted


def _held(sharding: Sharding) -> int:
    """Counts the bytes of this rank's shards, without padding."""
    views: list[ShardView] = []
    sharding.each_shard({name for name, _ in sharding.module.named_parameters()}, views.append)
    return sum(view.local.nbytes for view in views)
