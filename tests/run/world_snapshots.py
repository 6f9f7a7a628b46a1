"""Snapshots of shards: the same bits on any other world and sharding, one writer for each range, and
nothing that is damaged or half written is loaded. Each case also shows what happens without the
handling."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from file_aio import toy_nvme
from tiny import make_batch, part_of
from torch import Tensor
from world_everywhere import FIELDS, WAYS, Model
from world_hazards import refusal
from world_offload import nvme
from world_zero3 import sharded
from worlds import World, case

import tezo_ds
from tezo_ds.engine.live_bytes import LiveBytes
from tezo_ds.errors import StorageError
from tezo_ds.methods.mezo import Mezo
from tezo_ds.run import shardfiles, snapshots
from tezo_ds.run.snapshots import INDEX, checked_shards, save_shards
from tezo_ds.sharding import ShardView

ADAM = {"method": "mezo-adam", "probe": "inplace", "lr": 3e-3}


def made(world: World, way_name: str, **fields: object) -> tezo_ds.Engine:
    way = next(way for way in WAYS if way.name == way_name)
    model, config = way.model(world)
    fields = {**FIELDS, **ADAM, **fields}
    return tezo_ds.initialize(model, {**config, "tezo": fields} if config else fields)


def train(engine: tezo_ds.Engine, world: World, steps: int) -> list[tuple[float, ...]]:
    """Takes some steps and returns their slopes."""
    ranks = engine.sharding.world_size
    kappas = []
    for _ in range(steps):
        batch = make_batch(7, seed=engine.step_index)
        kappas.append(engine.step(part_of(batch, engine.sharding.rank, ranks)).kappa)
    return kappas


def numbers_of(engine: tezo_ds.Engine) -> list[tuple[ShardView, dict[str, Tensor]]]:
    """Copies all weights and moments that this rank holds."""
    found: list[tuple[ShardView, dict[str, Tensor]]] = []

    def note(view: ShardView) -> None:
        copies = {"weight": view.local.clone(), **engine.method.moments(view)}
        found.append((view, copies))

    engine.sharding.each_shard(engine.space.slices.keys(), note)
    return found


def alone() -> tezo_ds.Engine:
    """Makes an engine of one process by itself, whatever else runs."""
    engine = tezo_ds.initialize(Model(), {**FIELDS, **ADAM})
    engine.sharding.world_size = engine.sharding.everyone = 1
    engine.sharding.rank = engine.sharding.place = 0
    return engine


def assert_parts_of(engine: tezo_ds.Engine, one: tezo_ds.Engine) -> None:
    """Asserts that ranks hold the very bits that one process holds, moments included."""
    wholes = {view.name: numbers for view, numbers in numbers_of(one)}
    for view, numbers in numbers_of(engine):
        whole = wholes[view.name]
        assert view.numel == 0 or numbers.keys() == whole.keys() > {"moment1"}, view.key
        for kind, tensor in numbers.items():
            held = ShardView(view.name, view.shape, view.start, tensor, view.columns)
            for piece in held.pieces(1 << 20):
                rows = slice(piece.rows.start, piece.rows.stop)
                columns = slice(piece.columns.start, piece.columns.stop)
                expected = whole[kind].view(view.shape)[rows, columns]
                assert torch.equal(piece.values, expected), (view.key, kind)


WRITERS = {
    "replicated": {0}, "ZeRO-3": {0, 1, 2, 3}, "ZeRO-3, hpZ": {0, 1}, "ZeRO-3, CPU offload": {0, 1, 2},
    "ZeRO-3, hpZ, zero.Init": {0, 1},
    "FSDP2": {0, 1, 2, 3}, "FSDP2, hybrid": {0, 1}, "FSDP2 over tensor parallelism": {0, 1, 2, 3},
}  # fmt: skip


@case(worlds=(3, 4))
def a_snapshot_fits_every_sharding(world: World) -> None:
    ways, before = [way.name for way in WAYS if world.size in way.ranks], Model().state_dict()
    engines = {way: made(world, way, seed=number) for number, way in enumerate(ways)}
    for way, engine in engines.items():
        train(engine, world, 3)
        save_shards(engine, world.folder / f"{way} {world.size}")
    for way in ways:
        folder, one = world.folder / f"{way} {world.size}", alone()
        assert_each_range_is_stored_once(folder, WRITERS[way] & set(range(world.size)))
        checked_shards(one, folder)()
        for view, numbers in numbers_of(one):
            assert not torch.equal(numbers["weight"], before[view.name].flatten())
        for engine in engines.values():
            checked_shards(engine, folder)()
            assert_parts_of(engine, one)

    # Without the handling: every replica writes all that it has, and the count shows it.
    def only_me(_: object, keys: list) -> tuple[dict, list]:
        return dict.fromkeys(keys, (world.rank,)), []

    engine = engines["replicated" if world.size == 3 else "FSDP2, hybrid"]
    with mock.patch.object(snapshots, "holders_of", only_me):
        message = refusal(lambda: save_shards(engine, world.folder / "all"), StorageError)
    assert "ranks hold" in message


def assert_each_range_is_stored_once(folder: Path, writers: set[int]) -> None:
    files = sorted(folder.glob("*.safetensors"))
    assert {path.name for path in folder.iterdir()} == {INDEX, *(file.name for file in files)}
    assert {int(file.name[5:10]) for file in files} == writers, folder
    stored = [stored for file in files for stored in shardfiles.stored_in(file)]
    numel = sum(p.numel() for p in Model().parameters() if p.dim() > 1)
    for kind in ("weight", "moment1", "moment2"):
        assert sum(s.view.numel for s in stored if s.kind == kind) == numel, (folder, kind)


@case(worlds=(2, 3))
def a_snapshot_of_one_process_fits_a_world(world: World) -> None:
    one, folder = alone(), world.folder / f"whole {world.size}"
    train(one, world, 3)
    if world.rank == 0:
        save_shards(one, folder)
    dist.barrier()
    for way in ("ZeRO-3", "FSDP2"):
        engine = made(world, way)
        checked_shards(engine, folder)()
        assert_parts_of(engine, one)


@case(worlds=(3, 4), bits=True)
def a_run_goes_on_as_if_never_stopped(world: World) -> None:
    adam, tezo = ADAM, {"method": "tezo-adam", "probe": "fused", "lr": 1e-3}
    if world.size == 3:
        goes_on(world, "ZeRO-3", adam)
        goes_on(world, "FSDP2", tezo)
        return
    goes_on(world, "ZeRO-3, hpZ", tezo)
    goes_on(world, "ZeRO-3, hpZ, zero.Init", adam)


def goes_on(world: World, way: str, fields: dict) -> None:
    engine, folder = made(world, way, **fields), world.folder / f"{way} {fields['method']}"
    train(engine, world, 3)
    save_shards(engine, folder)
    state = {name: packed.data.clone() for name, packed in engine.method.state.items()}

    def resumed() -> tezo_ds.Engine:
        again = made(world, way, **fields)
        checked_shards(again, folder)()
        for name, packed in again.method.state.items():
            packed.data.copy_(state[name])
        again.step_index = 3
        return again

    again, expected = resumed(), train(engine, world, 3)
    assert train(again, world, 3) == expected
    # By name, so the last of two ranges under hpZ. The other, which nothing gathers, may differ by
    # rounding from it, also in the run that never stopped: matrix products depend on the range.
    ours, theirs = ({view.name: n for view, n in numbers_of(e)} for e in (again, engine))
    for name, numbers in theirs.items():
        assert all(torch.equal(ours[name][kind], numbers[kind]) for kind in numbers), name
    found = again.state_dict()
    for name, tensor in engine.state_dict().items():
        assert torch.equal(found[name], tensor), name
    if fields is ADAM:
        with mock.patch.object(Mezo, "set_moments"):
            forgetful = resumed()
        assert train(forgetful, world, 3) != expected


@case(worlds=(2,))
def shards_in_files_are_saved_and_filled(world: World) -> None:
    fields = {**ADAM, "include": ["*layers.0*", "*embed*"]}
    with toy_nvme():
        engine, again = (sharded(fields=fields, zero=nvme(world)) for _ in range(2))
        for step in range(3):
            engine.step(part_of(make_batch(4, seed=step), world.rank, world.size))
        save_shards(engine, world.folder / "offloaded")
        checked_shards(again, world.folder / "offloaded")()
        changed = 0
        for (view, ours), (_, theirs) in zip(numbers_of(again), numbers_of(engine), strict=True):
            assert ours.keys() == theirs.keys() > {"moment1"}
            assert all(torch.equal(ours[kind], theirs[kind]) for kind in theirs), view.key
            changed += view.numel
        assert changed
        batch = part_of(make_batch(4), world.rank, world.size)
        for _ in range(3):
            assert again.loss(batch) == engine.loss(batch)


def damaged(
    engine: tezo_ds.Engine, world: World, file: Path, damage: Callable[[Path], None]
) -> str:
    """Returns what every rank says of a snapshot of which rank 0 damages a file; mends the file
    afterwards."""
    content = file.read_bytes()
    before = numbers_of(engine)
    dist.barrier()
    if world.rank == 0:
        damage(file)
    dist.barrier()
    message = refusal(lambda: checked_shards(engine, file.parent)(), StorageError)
    for (_, ours), (_, theirs) in zip(numbers_of(engine), before, strict=True):
        assert ours.keys() == {"weight"} and torch.equal(ours["weight"], theirs["weight"])
    said: list[str] = [""] * world.size
    dist.all_gather_object(said, message)
    assert set(said) == {message}
    if world.rank == 0:
        file.write_bytes(content)
    dist.barrier()
    return message


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@case(worlds=(2, 3))
def what_is_damaged_is_named_by_all_ranks(world: World) -> None:
    engine, folder = made(world, "FSDP2"), world.folder / "damaged"
    train(engine, world, 3)
    save_shards(engine, folder)
    again, names = made(world, "ZeRO-3"), sorted(path.name for path in folder.glob("*.safetensors"))

    def said(file: str, damage: Callable[[Path], None]) -> str:
        return damaged(again, world, folder / file, damage)

    for file in (names[0], names[-1]):
        size = (folder / file).stat().st_size
        assert f"{file} is missing; " in said(file, Path.unlink)
        assert f"{file} has {size - 3} bytes and not {size}; " in said(file, cut)
        assert f"{file} does not have its digest; " in said(file, flip)
    assert f"{INDEX} is damaged" in said(INDEX, cut)
    other = said(INDEX, lambda path: path.write_text(path.read_text().replace("61", "62")))
    assert f"{INDEX} is damaged" in other
    assert "No such file" in said(INDEX, Path.unlink)
    checked_shards(again, folder)()  # put right, it is whole

    # Without the digests nobody would notice.
    if world.rank == 0:
        flip(folder / names[-1])
    dist.barrier()
    with mock.patch.object(snapshots, "_check_files"):
        checked_shards(again, folder)()
    dist.barrier()


@case(worlds=(2, 3))
def a_rank_that_cannot_write_stops_all_and_leaves_nothing(world: World) -> None:
    engine, bad = made(world, "ZeRO-3"), world.size - 1
    train(engine, world, 3)
    home = world.folder / "full disk"
    if world.rank == 0:
        home.mkdir()
    dist.barrier()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def refused(owner: object, name: str, rank: int) -> str:
        work = full if world.rank == rank else getattr(owner, name)
        with mock.patch.object(owner, name, work):
            message = refusal(lambda: save_shards(engine, home / "x"), StorageError)
        dist.barrier()
        assert not list(home.iterdir()), list(home.iterdir())
        dist.barrier()
        assert f"{home / 'x'}: snapshot not written, by rank {rank}: " in message
        return message

    assert "No space left" in refused(shardfiles, "_write", bad)
    assert "No space left" in refused(shardfiles, "_write", 0)
    assert "No space left" in refused(Path, "rename", 0)
    assert "No space left" in refused(snapshots, "sync_folder", 0)

    # What a killed run leaves has a dot, is no snapshot, and is in nobody's way.
    with mock.patch.object(snapshots, "_finish"), mock.patch.object(snapshots.shutil, "rmtree"):
        save_shards(engine, home / "x")
    assert [path.name for path in home.iterdir()] == [".x.partial"]
    left = refusal(lambda: checked_shards(engine, home / ".x.partial")(), StorageError)
    assert INDEX in left
    save_shards(engine, home / "x")
    assert [path.name for path in home.iterdir()] == ["x"]
    assert "there already" in refusal(lambda: save_shards(engine, home / "x"), StorageError)
    checked_shards(engine, home / "x")()
    assert json.loads((home / "x" / INDEX).read_text())["format"] == 1


@case(worlds=(3,))
def a_snapshot_takes_the_moments_of_one_shard(world: World) -> None:
    engine, again = made(world, "FSDP2"), made(world, "FSDP2")
    train(engine, world, 3)
    shards = [view.local.nbytes for view, _ in numbers_of(engine)]
    with LiveBytes() as memory:
        save_shards(engine, world.folder / "small")
    assert 2 * max(shards) <= memory.peak < 3 * max(shards) < sum(shards)
    checked_shards(again, world.folder / "small")()
