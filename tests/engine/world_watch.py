"""Replicas that differ: every rank stops and names what and where. Each case also shows that without the
check the run goes on as if nothing had happened."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from unittest import mock

import torch
import torch.distributed as dist
from tiny import make_batch, part_of, tiny
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from world_fsdp2 import shard, tensor_parallel
from world_hazards import refusal
from world_replicated import FIELDS, recorded_collectives
from world_zero3 import sharded, views_of
from worlds import World, case

import tezo_ds
from tezo_ds.engine import replicas
from tezo_ds.sharding import Sharding, ShardView

EVERY = 3
HPZ = {"zero_hpz_partition_size": 2}
STEP_BYTES = 16 * 2 * FIELDS["queries"] + 8
Spoil = Callable[[tezo_ds.Engine], None]


def replicated(model: nn.Module | None = None, **fields: object) -> tezo_ds.Engine:
    return tezo_ds.initialize(tiny() if model is None else model, {**FIELDS, **fields})


def odd_one(world: World) -> int:
    """Returns the rank to spoil: the first of three, which a majority outvotes; the second of two, as the
    first is believed."""
    return 1 if world.size == 2 else 0


def others(world: World) -> str:
    ranks = [str(rank) for rank in range(world.size) if rank != odd_one(world)]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(ranks)


def step(engine: tezo_ds.Engine, world: World) -> None:
    index = engine.step_index
    engine.step(part_of(make_batch(2 * world.size, seed=index), world.rank, world.size))


def bump(tensor: torch.Tensor, place: int) -> None:
    """Puts the next larger number in place of one element."""
    tensor[place] = torch.nextafter(tensor[place], tensor.new_tensor(math.inf))


def all_equal(tensor: torch.Tensor) -> bool:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return all(torch.equal(tensor, other) for other in gathered)


def stopped_by(make: Callable[..., tezo_ds.Engine], spoil: Spoil, bad: int, world: World) -> str:
    """Returns the check's message about an engine that rank `bad` spoils after `EVERY` steps; the same
    engine without checks goes on, and is found out at the end."""
    engine, unwatched = make(check_every=EVERY), make(check_every=0)
    for each in (engine, unwatched):
        for _ in range(EVERY):
            step(each, world)
        each.check()
        if world.rank == bad:
            spoil(each)
    message = refusal(lambda: step(engine, world), tezo_ds.ShardingError)
    assert engine.step_index == EVERY and message.startswith(f"after {EVERY} steps: ")
    step(unwatched, world)
    found = refusal(unwatched.check, tezo_ds.ShardingError)
    assert found.startswith(f"after {EVERY + 1} steps: ") and f" on rank {bad} differ from" in found
    return message


@case(worlds=(2, 3))
def one_bit_of_the_state_on_one_rank_stops_all(world: World) -> None:
    name, bad = "model.layers.1.mlp.up_proj.weight", odd_one(world)

    def zero3(**fields: object) -> tezo_ds.Engine:
        return sharded(fields=fields)

    for make, vector in ((replicated, "coefficients"), (zero3, "momentum")):

        def spoil(engine: tezo_ds.Engine, vector: str = vector) -> None:
            # By more than the last bit, which a later step may round away again.
            engine.method.state[vector].data[engine.space.slices[name]][0] *= 1 + 2**-40

        message = stopped_by(functools.partial(make, method="tezo-m"), spoil, bad, world)
        assert f"{vector} of {name} on rank {bad} differ from those on {others(world)}; " in message

    engine = replicated()
    for _ in range(EVERY):
        step(engine, world)
    if world.rank == bad:
        bump(engine.method.coefficients, engine.space.slices[name].start)
    before = [view.local.clone() for view in views_of(engine)]
    message = refusal(engine.merge, tezo_ds.ShardingError)
    assert f"coefficients of {name} on rank {bad} differ from" in message
    after = [view.local for view in views_of(engine)]
    assert all(map(torch.equal, before, after))  # nothing was merged


def spoil_weight(name: str) -> Spoil:
    """Makes a function that changes one element of this rank's last shard of a weight, under hpZ the
    secondary copy."""

    def spoil(engine: tezo_ds.Engine) -> None:
        bump([view for view in views_of(engine) if view.name == name][-1].local, 5)

    return spoil


@case(worlds=(2, 3))
def one_bit_of_a_weight_that_was_written_stops_all(world: World) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    make, bad = functools.partial(replicated, probe="inplace"), odd_one(world)
    message = stopped_by(make, spoil_weight(name), bad, world)
    expected = f"weights of {name} on rank {bad} differ from those on {others(world)}; "
    assert expected in message

    engine = replicated()
    step(engine, world)
    if world.rank == bad:  # by its sign, as the last bit may round away when the update is added
        next(view for view in views_of(engine) if view.name == name).local[5].neg_()
    engine.check()  # nothing was written, as far as a fused probe knows
    assert expected in refusal(engine.merge, tezo_ds.ShardingError)


@case(worlds=(4,))
def one_bit_of_a_secondary_copy_under_hpz_stops_all(world: World) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"

    def hpz(**fields: object) -> tezo_ds.Engine:
        engine = sharded(fields={"probe": "inplace", **fields}, zero=HPZ)
        for parameter in engine.sharding.module.parameters():  # which no digest may read
            start = parameter.ds_zero_partition_rank * parameter.ds_tensor.numel()
            parameter.ds_tensor.data[max(0, parameter.ds_numel - start) :].fill_(world.rank)
        return engine

    message = stopped_by(hpz, spoil_weight(name), 3, world)
    assert f"weights of {name} on rank 3 differ from those on rank 1; " in message


@case(worlds=(4,))
def fsdp2_hybrid_replicas_are_watched(world: World) -> None:
    name = "model.embed_tokens.weight"
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))

    def hybrid(**fields: object) -> tezo_ds.Engine:
        return tezo_ds.initialize(shard(tiny(), mesh), {**FIELDS, "probe": "inplace", **fields})

    message = stopped_by(hybrid, spoil_weight(name), 2, world)
    assert f"weights of {name} on rank 2 differ from those on rank 0; " in message


@case(worlds=(2,))
def ranks_that_share_data_are_watched_as_well(world: World) -> None:
    """Under tensor parallelism alone each rank is a data-parallel world of its own, and is still checked."""
    name = "model.layers.0.mlp.gate_proj.weight"
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "model"))
    model = shard(tensor_parallel("llama", mesh["model"]), mesh["data"])
    engine = tezo_ds.initialize(model, {**FIELDS, "probe": "inplace"})
    assert (engine.sharding.world_size, engine.sharding.everyone) == (1, 2)
    for _ in range(EVERY):
        engine.step(make_batch(3))
    engine.check()
    coefficient = engine.method.coefficients[engine.space.slices[name]]
    if world.rank == 1:
        bump(coefficient, 0)
    message = refusal(engine.check, tezo_ds.ShardingError)
    assert f"coefficients of {name} on rank 1 differ from those on rank 0; " in message


@case(worlds=(2, 3))
def ranks_that_were_started_otherwise_stop_at_once(world: World) -> None:
    bad, odd, rest = world.rank == odd_one(world), f"rank {odd_one(world)}", others(world)

    def differs(make: Callable[[], object], item: str, on_odd: object, on_rest: object) -> None:
        message = refusal(make, tezo_ds.ConfigError)
        start = f"ranks were not started alike: {item} is "
        assert message.startswith(start), message
        values = message.removeprefix(start).replace(" (and ", "; ").split("; ")[:2]
        assert set(values) == {f"{on_odd} on {odd}", f"{on_rest} on {rest}"}, message

    seed = 6 if bad else 5
    for make in (replicated, lambda seed: sharded(fields={"seed": seed})):
        differs(lambda make=make: make(seed=seed), "seed", 6, 5)
    name, kind = "model.layers.0.mlp.gate_proj.weight", "torch.float32"
    larger = tiny(mlp=38 if bad else 37)
    differs(lambda: replicated(larger), name, f"(38, 22) {kind}", f"(37, 22) {kind}")
    untied = tiny(tied=not bad)
    differs(lambda: replicated(untied), "lm_head.weight", f"(61, 22) {kind}", "missing")
    name, frozen = "model.embed_tokens.weight", tiny()
    frozen.model.embed_tokens.requires_grad_(not bad)
    shape = f"(61, 22) {kind}"
    differs(lambda: replicated(frozen), name, f"{shape}, frozen", shape)
    message = refusal(lambda: replicated(tiny(seed=int(bad))), tezo_ds.ShardingError)
    assert message.startswith(
        f"after 0 steps: weights of {name} on {odd} differ from those on {rest}"
    )

    with (
        mock.patch.object(tezo_ds.engine.engine, "require_same_start"),
        mock.patch.object(replicas.Watch, "check"),
    ):
        for engine in (replicated(seed=seed), replicated(tiny(seed=int(bad)))):
            for _ in range(EVERY):
                step(engine, world)
        assert not all_equal(views_of(engine)[0].local)


@case(worlds=(2, 3))
def a_check_sends_a_few_numbers(world: World) -> None:
    """A check sends three numbers of 8 bytes, and two more for each set of replicas where weights are
    written."""
    own, a_step = ("all_reduce", 3 * 8), ("all_reduce", STEP_BYTES)

    def wire(engine: tezo_ds.Engine) -> list[list[tuple[str, int]]]:
        calls = []
        for _ in range(5):
            with recorded_collectives() as made:
                step(engine, world)
            calls.append(list(made))
        return calls

    for probe, copies in (("fused", []), ("inplace", [("all_reduce", 2 * 8)])):
        checked = [own, *copies, a_step]
        found = wire(replicated(probe=probe, check_every=2))
        # Once: whether any rank has several examples in a row; the default loss with the model's own.
        first = [("all_reduce", 8), ("all_reduce", 8)]
        assert found == [[*first, a_step], [a_step], checked, [a_step], checked], found

    # Under ZeRO-3 without hpZ no shard has a replica. That takes one look, and then no digests.
    engine = sharded(fields={"probe": "inplace", "check_every": 2})
    with mock.patch.object(replicas, "digest", wraps=replicas.digest) as digested:
        found = wire(engine)[1:]  # the first forward is DeepSpeed's to prepare
    look = [own, ("all_gather_object", 0), a_step]
    assert found == [[a_step], look, [a_step], [own, a_step]], found
    assert {len(call.args[0]) for call in digested.call_args_list} == {engine.space.numel}


@case(worlds=(3,))
def shards_that_move_are_found_again(world: World) -> None:
    """Replicas are found again after shards moved, as under hpZ, whose secondary copies begin with the
    first forward."""
    engine = replicated(probe="inplace")
    every = type(engine.sharding).each_shard

    def apart(self: Sharding, names: object, write: Callable[[ShardView], None]) -> None:
        """Gives rank 0 the first 10 elements of each matrix, and the other ranks the rest."""

        def part(view: ShardView) -> None:
            cut = slice(0, 10) if world.rank == 0 else slice(10, None)
            write(ShardView(view.name, view.shape, cut.start, view.local[cut]))

        every(self, names, part)

    with mock.patch.object(type(engine.sharding), "each_shard", apart):
        views_of(engine)[0].local[0] += world.rank == 0  # nobody else's
        engine.check()
        assert engine._watch._sets == [(1, 2)]
        if world.rank == 1:
            bump(views_of(engine)[3].local, 5)
        message = refusal(engine.check, tezo_ds.ShardingError)
        assert "on rank 2 differ from those on rank 1; " in message
