"""Traffic of a step: one model's worth of parameters whatever Q, and between whole copies scalars only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import world_fsdp2
from tiny import make_batch, part_of, tiny
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from traffic import Collective, Traffic, Wire
from world_hazards import squares
from world_replicated import FIELDS
from world_zero3 import ZERO3
from worlds import World, case

import tezo_ds
from tezo_ds.losses import head
from tezo_ds.sharding import zero3

# A few layers at a time, as with a model worth sharding; by default a tiny one comes in one gather.
BUCKETS = {"stage3_prefetch_bucket_size": 1000, "stage3_max_live_parameters": 4000}
HALVES = [(0, 1), (2, 3)]
ALL_REDUCE = ("allreduce_", 16 * 2 * FIELDS["queries"] + 8)  # a step's scalars

Losses = Callable[[Tensor, slice], Tensor]


def partitioned(tied: bool = True, **zero: object) -> deepspeed.DeepSpeedEngine:
    """Makes a tiny Llama under ZeRO-3."""
    optimization = {**ZERO3["zero_optimization"], **zero}
    return zero3.wrap(tiny("llama", tied), {"zero_optimization": optimization})


def trainer(model: nn.Module, **fields: object) -> tezo_ds.Engine:
    engine = tezo_ds.initialize(model, {**FIELDS, **fields})
    engine.objective.first = None  # the forward that compares losses, once a run, is no step's
    return engine


def padded(parameters: Iterable[nn.Parameter], ranks: int) -> int:
    """Counts elements with the padding to a multiple of the ranks: of the whole (ZeRO-3) or of rows
    (FSDP2)."""
    total = 0
    for p in parameters:
        rows, width = (p.ds_numel, 1) if hasattr(p, "ds_numel") else (len(p), p.numel() // len(p))
        total += -(-rows // ranks) * ranks * width
    return total


def mine(world: World) -> dict[str, Tensor]:
    """Returns this rank's examples; the ranks have unequally many labels."""
    return part_of(make_batch(7), world.rank, world.size)


def steps_of(engine: tezo_ds.Engine, batch: dict[str, Tensor]) -> list[Traffic]:
    """Records the traffic of each of three steps."""
    seen = []
    for _ in range(3):
        with Traffic() as traffic:
            engine.step(batch)
        seen.append(traffic)
    return seen


def plain_forwards(model: nn.Module, world: World) -> list[Traffic]:
    """Records the traffic of three forwards of the model by itself. In the first two, DeepSpeed learns the
    order of its layers, and compares lists of them over the world."""
    trainer(model)  # or else FSDP2 keeps its root whole after the first
    ids, seen = mine(world)["input_ids"], []
    for _ in range(3):
        with Traffic() as traffic, torch.no_grad():
            model(input_ids=ids)
        seen.append(traffic)
    return seen


def assert_steps_gather(
    numel: int, model: nn.Module, world: World, fused: tuple[int, ...], inplace: tuple[int, ...]
) -> None:
    """Asserts that a step gathers `numel` elements once with the fused probe, and once a branch in place.

    `fused` and `inplace` are the numbers of directions to try.
    """
    assert plain_forwards(model, world)[-1].gathered == numel
    tries = [("fused", queries, 1) for queries in fused]
    tries += [("inplace", queries, 2 * queries) for queries in inplace]
    for probe, queries, times in tries:
        engine = trainer(model, probe=probe, queries=queries)
        assert [step.gathered for step in steps_of(engine, mine(world))] == [times * numel] * 3


@case(worlds=(2, 3))
def every_kind_of_collective_is_seen(world: World) -> None:
    n, everyone, x = world.size, tuple(range(world.size)), torch.ones(5)
    pair, many, parts = dist.new_group([0, 1]), torch.empty(5 * n), list(torch.empty(n, 5))
    rows = distribute_tensor(torch.zeros(n, 5), init_device_mesh("cpu", (n,)), [Shard(0)])

    def coalesced() -> None:
        with dist._coalescing_manager(async_ops=True) as manager:
            for _ in range(3):
                dist.all_gather_into_tensor(many, x)
        manager.wait()

    calls: list[tuple[str, int, Callable[[], object]]] = [
        ("allreduce_", 5, lambda: dist.all_reduce(x)),
        ("broadcast_", 5, lambda: dist.broadcast(x, 0)),
        ("allgather_", 5 * n, lambda: dist.all_gather(parts, x)),
        ("_allgather_base_", 5 * n, lambda: dist.all_gather_into_tensor(many, x)),
        ("allgather_into_tensor_coalesced_", 15 * n, coalesced),
        ("_reduce_scatter_base_", 5 * n, lambda: dist.reduce_scatter_tensor(x, many)),
        ("alltoall_base_", 5 * n, lambda: dist.all_to_all_single(many, many.clone())),
        ("reduce_", 5, lambda: dist.reduce(x, 0)),
        ("all_reduce", 5, lambda: functional.all_reduce(x, "sum", dist.group.WORLD).sum()),
        ("all_gather_into_tensor", 5 * n, lambda: rows.full_tensor()),
        ("allreduce_", 5, lambda: deepspeed.comm.all_reduce(x)),
        ("broadcast_", 5, lambda: deepspeed.comm.broadcast(x, 0)),
        ("_allgather_base_", 5 * n, lambda: deepspeed.comm.allgather_fn(many, x)),
    ]
    for name, numel, call in calls:
        with Traffic() as traffic:
            call()
        assert traffic.calls == [Collective(name, everyone, numel, 4 * numel)], traffic.calls
        assert traffic.gathered == (numel if "gather" in name else 0)
    with Traffic() as traffic:
        dist.all_gather_object([None] * n, "text")
        dist.broadcast_object_list(["text"], 0)
        dist.barrier()
    ops = [call.op for call in traffic.calls]
    assert ops == ["allgather_", "allgather_", "broadcast_", "broadcast_", "barrier"]
    with Traffic() as traffic:
        if world.rank < 2:
            dist.all_reduce(x.double(), group=pair)
    assert traffic.calls == [Collective("allreduce_", (0, 1), 5, 40)] * (world.rank < 2)
    assert traffic.across([(0, 1)]) == []
    assert traffic.across([(0,), (1, 2)]) == [("allreduce_", 40)] * (world.rank < 2)


class Wide(nn.Module):
    """A model with parameters enough to drown gloo's headers, of sizes that no world divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(401, 401) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@case(worlds=(3,))
def the_kernel_sends_what_is_recorded(world: World) -> None:
    fields = {**FIELDS, "rho": 1e-2, "queries": 3}
    batch = {"x": torch.randn(2, 401, generator=torch.Generator().manual_seed(world.rank))}
    for model in (zero3.wrap(Wide(), ZERO3), world_fsdp2.shard(Wide())):
        for probe in ("fused", "inplace"):
            engine = tezo_ds.initialize(model, {**fields, "probe": probe}, squares)
            for _ in range(3):
                engine.step(batch)
            wire = Wire()
            with Traffic() as traffic:
                sent = sum(wire.sent_during(lambda: engine.step(batch)).values())  # noqa: B023
            recorded = sum(call.nbytes for call in traffic.calls)
            expected = recorded * (world.size - 1) / world.size  # around a ring
            assert 0.999 * expected < sent < 1.02 * expected, (sent, expected)

    # What it would look like if the recorder missed something, as it does in another thread.
    traffic, thread = Traffic(), threading.Thread(target=dist.all_reduce, args=(torch.ones(10**5),))

    def unseen() -> None:
        with traffic:
            thread.start()
            thread.join()

    assert sum(wire.sent_during(unseen).values()) > 300_000 and traffic.calls == []


@case(worlds=(3,))
def zero3_gathers_one_model_a_step(world: World) -> None:
    model = partitioned(tied=True, **BUCKETS)
    numel = padded(model.parameters(), world.size)
    assert_steps_gather(numel, model, world, fused=(1, 5), inplace=(2,))
    step = steps_of(trainer(model), mine(world))[-1]
    assert sum(call.gathers for call in step.calls) > 5  # BUCKETS do make it several

    model = partitioned(tied=False)
    assert_steps_gather(padded(model.parameters(), world.size), model, world, (2,), (1,))

    # A tied weight whose uses are further apart than stage3_max_reuse_distance elements is gathered
    # for each, in a plain forward too.
    model = partitioned(tied=True, **BUCKETS, stage3_max_reuse_distance=500)
    again = padded([model.module.lm_head.weight], world.size)
    assert_steps_gather(numel + again, model, world, (2,), ())


def through_the_hooks(tap: head._Tap, chosen: Tensor, reduce: Losses) -> Tensor:
    """Runs the layer's hooks, which gather and release its weight, for every chunk."""
    tap._layer.__dict__["forward"] = tap._project
    tap._project = tap._layer
    return IN_CHUNKS(tap, chosen, reduce)


IN_CHUNKS = head._Tap._in_chunks


@case(worlds=(2,))
def chunks_of_the_output_layer_share_one_gather(world: World) -> None:
    batch = make_batch(3)  # the same on both ranks, as without the handling they gather by chunk
    chunks = int((batch["labels"][:, 1:] != -100).sum())
    kept = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}  # nothing
    fsdp2 = tiny("llama", tied=False)
    fully_shard(fsdp2.lm_head)
    with mock.patch.object(head, "CHUNK_NUMEL", 1):
        for model in (partitioned(False, **kept), world_fsdp2.shard(fsdp2)):
            numel = padded(model.parameters(), world.size)
            plain_forwards(model, world)
            for queries in (1, 2):
                engine = trainer(model, queries=queries)
                assert [step.gathered for step in steps_of(engine, batch)] == [numel] * 3
                assert engine.objective._head.mode == "chunks"
            with mock.patch.object(head._Tap, "_in_chunks", through_the_hooks):
                for step in steps_of(trainer(model), batch):
                    assert step.gathered > numel + (chunks - 2) * 61 * 22


@case(worlds=(4,))
def scalars_alone_cross_between_hpz_groups(world: World) -> None:
    groups = deepspeed.utils.groups
    try:
        model = partitioned(zero_hpz_partition_size=2, **BUCKETS)
        numel = padded(model.parameters(), world.size)
        first, second, third = (step.across(HALVES) for step in plain_forwards(model, world))
        assert {op for op, _ in first + second} == {"broadcast_"} and third == []
        for probe, forwards in (("fused", 1), ("inplace", 4)):
            engine = trainer(model, probe=probe)
            for _ in range(2):
                for step in steps_of(engine, mine(world)):
                    assert step.across(HALVES) == [ALL_REDUCE]
                    assert step.gathered == forwards * numel
                engine.merge()
                engine.state_dict()  # gathers over the world, from the primary partitions
            assert_little_crosses(engine, world)

        # A secondary copy dropped, as DeepSpeed does after an optimizer's step, comes back from
        # partitions all over the world; so do those of plain ZeRO-3 in every forward.
        for parameter in model.module.parameters():
            parameter.ds_secondary_tensor = None
        with Traffic() as traffic:
            engine.loss(mine(world))
        assert sum(nbytes for _, nbytes in traffic.across(HALVES)) == 4 * numel + 16
    finally:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    step = steps_of(trainer(partitioned()), mine(world))[-1]  # DeepSpeed has settled by the third
    assert sum(nbytes for _, nbytes in step.across(HALVES)) == 4 * numel + ALL_REDUCE[1]


def assert_little_crosses(engine: tezo_ds.Engine, world: World) -> None:
    """Asserts, by the kernel's count, that a step sends the other group no more than its all-reduce takes."""
    wire, batch, own = Wire(), mine(world), HALVES[world.rank // 2]

    def other_group(call: Callable[[], object]) -> int:
        return sum(n for rank, n in wire.sent_during(call).items() if rank not in own)

    scalars = torch.zeros(ALL_REDUCE[1] // 8, dtype=torch.float64)
    alone = other_group(lambda: dist.all_reduce(scalars))
    assert other_group(lambda: engine.step(batch)) <= alone < 2000


@case(worlds=(2,))
def fsdp2_gathers_one_model_a_step(world: World) -> None:
    model = world_fsdp2.shard(tiny("llama", tied=False))
    assert_steps_gather(padded(model.parameters(), world.size), model, world, (2,), (1,))
    model = world_fsdp2.shard(tiny("llama", tied=True))
    assert_steps_gather(padded(model.parameters(), world.size), model, world, (1, 5), (2,))
    step = steps_of(trainer(model), mine(world))[-1]
    assert sum(call.gathers for call in step.calls) == 3  # two blocks and the root


@case(worlds=(4,))
def scalars_alone_cross_between_fsdp2_replicas(world: World) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = world_fsdp2.shard(tiny(), mesh)
    for probe, forwards in (("fused", 1), ("inplace", 4)):
        engine = trainer(model, probe=probe)
        for _ in range(2):
            for step in steps_of(engine, mine(world)):
                assert step.across(HALVES) == [ALL_REDUCE]
                assert step.gathered == forwards * padded(model.parameters(), 2)
            engine.merge()
        assert_little_crosses(engine, world)
    step = steps_of(trainer(world_fsdp2.shard(tiny())), mine(world))[-1]  # one copy over all ranks
    assert sum(nbytes for _, nbytes in step.across(HALVES)) > 4 * padded(tiny().parameters(), 1)
