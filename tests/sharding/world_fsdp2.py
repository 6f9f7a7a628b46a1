"""FSDP2 alone, hybrid and over tensor parallelism, equal to one process; its hazards, each also shown
without the handling."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from tiny import make_batch, part_of, tiny
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from world_hazards import (
    Lopsided,
    assert_write_was_lost,
    assert_write_was_seen,
    lopsided,
    merge_after_same_steps,
    refusal,
    squares,
)
from world_replicated import FIELDS, assert_equal_on_all_ranks, assert_same_run
from world_zero3 import views_of
from worlds import World, case

import tezo_ds
from tezo_ds.sharding import fsdp2

REAL_MODE = torch.inference_mode
MLP = 38  # torch's tensor parallelism wants sizes that its ranks divide


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Returns the layers of a language model."""
    return next(list(m) for m in model.modules() if isinstance(m, nn.ModuleList))


def shard(model: nn.Module, mesh: DeviceMesh | None = None, **kwargs: object) -> nn.Module:
    """Shards a model by FSDP2: one group a block, and the root."""
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def sharded(
    kind: str = "llama", tied: bool = True, fields: dict | None = None,
    mesh: DeviceMesh | None = None, **kwargs: object,
) -> tezo_ds.Engine:  # fmt: skip
    """Makes an engine on a tiny model under FSDP2."""
    model = shard(tiny(kind, tied), mesh, **kwargs)
    return tezo_ds.initialize(model, {**FIELDS, **(fields or {})})


@case(worlds=(1, 2, 3))
def fsdp2_runs_as_one_process(world: World) -> None:
    for kind, tied in (("llama", True), ("opt", False), ("neox", True)):
        for probe in ("fused", "inplace"):
            fields = {"probe": probe}
            engine = sharded(kind, tied, fields)
            assert isinstance(engine.sharding, fsdp2.Fsdp2)
            assert engine.sharding.world_size == world.size
            assert_same_run(engine, world, kind, tied, fields)
            assert_equal_on_all_ranks(engine.method.coefficients)
            assert engine.objective._head.mode == "chunks"


@case(worlds=(2, 3, 4))
def fsdp2_shards_are_whole_rows_and_may_be_empty(world: World) -> None:
    def make(fields: dict) -> tezo_ds.Engine:
        return tezo_ds.initialize(fully_shard(Lopsided()), fields, squares)

    for engine, reference in lopsided(make):
        views = {view.name: view for view in views_of(engine)}
        assert views["second.weight"].numel == (3 if world.rank == 0 else 0)
        assert all(view.start % view.width == 0 for view in views.values())
        merge_after_same_steps(engine, reference, world)
        expected, before = reference.state_dict(), Lopsided().state_dict()
        for name, tensor in engine.state_dict().items():
            assert (tensor - before[name]).abs().max() > 1e-4
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


@case(worlds=(1, 2, 3))
def fsdp2_merge_is_seen_by_forwards(world: World) -> None:
    assert_write_was_seen(sharded(), world)
    assert_write_was_seen(sharded(reshard_after_forward=False), world)
    if world.size == 1:
        return

    # Without the handling: the root stays gathered after its forward, and writes are lost.
    engine = sharded()
    shards = {name: p for name, p in engine.sharding.module.named_parameters()}

    def write_to_kept_shards(names, write):
        for name in names:
            write(fsdp2._view(name, shards[name]))

    with (
        mock.patch.object(FSDPModule, "reset_iter_state"),
        mock.patch.object(engine.sharding, "each_shard", write_to_kept_shards),
    ):
        engine.sharding.module.set_reshard_after_forward(False)
        assert_write_was_lost(engine, world)


@case(worlds=(2,))
def fsdp2_forwards_leave_nothing_behind(world: World) -> None:
    engine = sharded()
    order = engine.sharding.module._get_fsdp_state()._comm_ctx.post_forward_order
    batch = part_of(make_batch(4), world.rank, world.size)
    for _ in range(3):
        engine.step(batch)
        assert order == []
    with mock.patch.object(FSDPModule, "reset_iter_state"):
        for _ in range(3):
            engine.step(batch)
    assert len(order) == 9  # two blocks and the root, for ever


@case(worlds=(2,))
def fsdp2_outlives_inference_mode(world: World) -> None:
    def losses(engine: tezo_ds.Engine) -> list[float]:
        batch = part_of(make_batch(4), world.rank, world.size)
        with torch.inference_mode():
            inside = [engine.loss(batch) for _ in range(2)]
        return [*inside, engine.loss(batch), engine.step(batch).loss]

    inside, again, outside, _ = losses(sharded())
    assert inside == again == outside

    def kept(mode: bool = True) -> contextlib.AbstractContextManager:
        return REAL_MODE() if mode else contextlib.nullcontext()

    with mock.patch.object(torch, "inference_mode", kept):
        message = refusal(lambda: losses(sharded()), RuntimeError)
    assert "nference tensor" in message, message


@case(worlds=(2, 3))
def fsdp2_recovers_from_an_error_in_a_forward(world: World) -> None:
    class Broken(Exception):
        pass

    def fail(*_: object) -> None:
        raise Broken

    def losses(engine: tezo_ds.Engine) -> tuple[float, float]:
        """Returns the loss with an update kept aside, and the loss after that is written, following a
        forward that failed."""
        batch = part_of(make_batch(6), world.rank, world.size)
        engine.method.coefficients.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            beside = engine.loss(batch)
        handle = blocks_of(engine.sharding.module)[1].mlp.register_forward_pre_hook(fail)
        with contextlib.suppress(Broken):
            engine.loss(batch)
        handle.remove()
        engine.merge()
        engine.loss(batch)
        return beside, engine.loss(batch)

    beside, written = losses(sharded())
    torch.testing.assert_close(written, beside, rtol=1e-4, atol=0)
    with mock.patch.object(FSDPModule, "reset_iter_state"):
        beside, written = losses(sharded())
    assert abs(written - beside) > 1e-3  # the second block's update is lost


@case(worlds=(2,))
def fsdp2_mixed_precision_gathers_bfloat16(world: World) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for probe in ("fused", "inplace"):
        fields = {"probe": probe}
        engine = sharded(fields=fields, mp_policy=policy)
        assert {matrix.dtype for matrix in engine.space.matrices} == {torch.bfloat16}
        views = views_of(engine)
        assert {view.local.dtype for view in views} == {torch.float32}
        before = [view.local.clone() for view in views]
        batch = part_of(make_batch(6), world.rank, world.size)
        for _ in range(3):
            report = engine.step(batch)
        assert report.kappa[0] != 0
        for view, original in zip(views_of(engine), before, strict=True):
            assert torch.equal(view.local, original)
        assert_write_was_seen_roughly(engine, world)


def assert_write_was_seen_roughly(engine: tezo_ds.Engine, world: World) -> None:
    """Asserts that a merge changes no loss beyond bfloat16's rounding of the merged weights."""
    batch = part_of(make_batch(6), world.rank, world.size)
    base = engine.loss(batch)
    engine.method.coefficients.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    beside = engine.loss(batch)
    engine.merge()
    assert abs(beside - base) > 0.05
    torch.testing.assert_close(engine.loss(batch), beside, rtol=1e-2, atol=0)


@case(worlds=(4,))
def fsdp2_hybrid_runs_as_one_process(world: World) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for probe in ("fused", "inplace"):
        fields = {"probe": probe}
        engine = sharded("llama", True, fields, mesh)
        assert engine.sharding.world_size == 4
        assert_same_run(engine, world, "llama", True, fields)
        assert_equal_on_all_ranks(engine.method.coefficients)
    assert_write_was_seen(sharded(mesh=mesh), world)


def tensor_parallel(kind: str, mesh: DeviceMesh) -> nn.Module:
    """Splits a tiny model's MLPs by rows and by columns (GPT-NeoX's have biases), its output layer by
    rows."""
    model = tiny(kind, tied=False, mlp=MLP)
    down, up = RowwiseParallel(), ColwiseParallel()
    llama = {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down}
    neox = {"mlp.dense_h_to_4h": up, "mlp.dense_4h_to_h": down}
    for block in blocks_of(model):
        parallelize_module(block, mesh, llama if kind == "llama" else neox)
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    return model


@case(worlds=(2,))
def fsdp2_over_tensor_parallelism_runs_as_one_process(world: World) -> None:
    data = world.size // 2
    mesh = init_device_mesh("cpu", (data, 2), mesh_dim_names=("data", "model"))
    seen = World(mesh["data"].get_local_rank(), data, world.folder)
    for kind in ("llama", "neox"):
        for probe in ("fused", "inplace"):
            fields = {"probe": probe}
            model = shard(tensor_parallel(kind, mesh["model"]), mesh["data"])
            engine = tezo_ds.initialize(model, {**FIELDS, **fields})
            assert (engine.sharding.rank, engine.sharding.world_size) == (seen.rank, data)
            assert_same_run(engine, seen, kind, False, fields, mlp=MLP)
            assert_equal_on_all_ranks(engine.method.coefficients)
        assert_write_was_seen(engine, seen)
        before, merged = tiny(kind, False, mlp=MLP).state_dict(), engine.state_dict()
        assert list(merged) == (list(before) if world.rank == 0 else [])


@case(worlds=(2,))
def fsdp2_refuses_what_it_cannot_do(world: World) -> None:
    model = tiny()
    for block in blocks_of(model):
        fully_shard(block)
    message = refusal(lambda: tezo_ds.initialize(model, FIELDS), tezo_ds.ShardingError)
    assert "apply it to the whole model" in message
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("model",))
    split = tensor_parallel("llama", mesh)
    message = refusal(lambda: tezo_ds.initialize(split, FIELDS), tezo_ds.ShardingError)
    assert "fully_shard was not applied" in message


@case(worlds=(2,))
def weights_never_given_data_are_refused(world: World) -> None:
    with torch.device("meta"):
        model = shard(tiny())
    message = refusal(lambda: tezo_ds.initialize(model, {"rank": 2}), tezo_ds.ShardingError)
    assert "has no data" in message
