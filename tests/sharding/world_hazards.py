"""Hazards of ZeRO-3 without an optimizer. Each case also shows what happens without the handling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from tiny import make_batch, part_of, tiny
from torch import nn
from world_replicated import FIELDS, assert_same_run
from world_zero3 import ZERO3, sharded, views_of
from worlds import World, case

import tezo_ds
from tezo_ds.sharding import zero3

PERSISTENT = {"stage3_param_persistence_threshold": 100_000}
TORCH_LINEAR = F.linear


def refusal(call: Callable[[], object], error: type[Exception]) -> str:
    """Returns the one line with which `call` refuses."""
    try:
        call()
    except error as caught:
        assert "\n" not in str(caught)
        return str(caught)
    raise AssertionError(f"{error.__name__} was not raised")


def losses_around_merge(engine: tezo_ds.Engine, world: World) -> tuple[float, float, float]:
    """Returns the losses at W₀, at W₀ + a large update kept aside, and after writing that update."""
    batch = part_of(make_batch(6), world.rank, world.size)
    for _ in range(3):  # from the third forward on persistent parameters stay gathered
        base = engine.loss(batch)
    engine.method.coefficients.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    beside = engine.loss(batch)
    engine.merge()
    return base, beside, engine.loss(batch)


def assert_write_was_seen(engine: tezo_ds.Engine, world: World) -> None:
    base, beside, written = losses_around_merge(engine, world)
    assert abs(beside - base) > 0.05
    torch.testing.assert_close(written, beside, rtol=1e-4, atol=0)


def assert_write_was_lost(engine: tezo_ds.Engine, world: World) -> None:
    base, _, written = losses_around_merge(engine, world)
    assert written == base


@case(worlds=(2, 3))
def persistent_parameters_do_not_hide_writes(world: World) -> None:
    assert_write_was_seen(sharded(zero=PERSISTENT), world)
    fields = {"probe": "inplace"}
    engine = sharded(fields=fields, zero=PERSISTENT)
    assert_same_run(engine, world, "llama", True, fields)

    engine = sharded(zero=PERSISTENT)
    with mock.patch.object(DeepSpeedZeRoOffload, "partition_all_parameters"):
        message = refusal(lambda: losses_around_merge(engine, world), tezo_ds.ShardingError)
        assert "still AVAILABLE while being written" in message

    def write_at_once(self, names, write):
        for name, parameter in self.module.named_parameters():
            if name in names:
                for view in zero3._views(name, parameter):
                    write(view)

    with mock.patch.object(zero3.Zero3, "each_shard", write_at_once):
        assert_write_was_lost(sharded(zero=PERSISTENT), world)


@case(worlds=(3, 4))
def padding_is_never_read(world: World) -> None:
    for probe in ("fused", "inplace"):
        engine = sharded(fields={"probe": probe})
        pads = []
        for parameter in engine.sharding.module.parameters():
            start = parameter.ds_zero_partition_rank * parameter.ds_tensor.numel()
            pads.append(parameter.ds_tensor.data[max(0, parameter.ds_numel - start) :])
            pads[-1].fill_(float("nan"))
        padded = torch.tensor([sum(pad.numel() for pad in pads)])
        torch.distributed.all_reduce(padded)
        assert padded > 0  # sizes that do not divide by the world
        for view in views_of(engine):
            assert view.local.isfinite().all()
        assert_same_run(engine, world, "llama", True, {"probe": probe})
        engine.merge()
        assert all(pad.isnan().all() for pad in pads)
        assert all(tensor.isfinite().all() for tensor in engine.state_dict().values())


class Lopsided(nn.Module):
    """A model of 21 and 3 elements: shards end inside a row, and on 4 ranks the last holds none of the 3."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(7, 3, bias=False)
        self.second = nn.Linear(3, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def squares(outputs: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return (outputs - 1).square().sum(dim=1), torch.ones(len(outputs))


def lopsided(
    make: Callable[[dict], tezo_ds.Engine],
) -> Iterator[tuple[tezo_ds.Engine, tezo_ds.Engine]]:
    """Yields, for each probe, the engine that `make` makes of the fields, and one of a process alone."""
    for probe in ("fused", "inplace"):
        fields = {"rank": 1, "rho": 1e-2, "lr": 1e-2, "probe": probe, "queries": 2}
        reference = tezo_ds.initialize(Lopsided(), fields, squares)
        reference.sharding.world_size = 1
        yield make(fields), reference


def merge_after_same_steps(engine: tezo_ds.Engine, reference: tezo_ds.Engine, world: World) -> None:
    """Takes three steps, asserts equal losses, and merges both engines."""
    x = torch.randn(8, 7, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        ours = engine.step(part_of({"x": x}, world.rank, world.size))
        theirs = reference.step({"x": x})
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    engine.merge()
    reference.merge()


@case(worlds=(2, 3, 4))
def shards_may_be_empty_or_end_inside_a_row(world: World) -> None:
    def make(fields: dict) -> tezo_ds.Engine:
        return tezo_ds.initialize(Lopsided(), {**ZERO3, "tezo": fields}, squares)

    for engine, reference in lopsided(make):
        views = {view.name: view for view in views_of(engine)}
        if world.size == 4:
            assert (views["second.weight"].numel == 0) == (world.rank == 3)
            assert len(views["second.weight"].rows) == (0 if world.rank == 3 else 1)
        merge_after_same_steps(engine, reference, world)
        for name, tensor in engine.state_dict().items():
            moved = (tensor - Lopsided().state_dict()[name]).abs().max()
            assert moved > 1e-3
            expected = reference.sharding.module.state_dict()[name]
            torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-5)


@case(worlds=(4,))
def hpz_secondary_copies_follow_every_write(world: World) -> None:
    hpz = {"zero_hpz_partition_size": 2}
    engine = sharded(zero=hpz)
    batch = part_of(make_batch(6), world.rank, world.size)
    for _ in range(3):
        engine.step(batch)
    parameter = next(engine.sharding.module.parameters())
    assert parameter.ds_secondary_tensor is not None
    assert parameter.ds_secondary_tensor.numel() == 2 * parameter.ds_tensor.numel()
    assert_write_was_seen(sharded(zero=hpz), world)
    for probe in ("fused", "inplace"):
        engine = sharded(fields={"probe": probe}, zero=hpz)
        assert_same_run(engine, world, "llama", True, {"probe": probe})

    both = zero3._views
    with mock.patch.object(zero3, "_views", lambda *a: list(both(*a))[:1]):  # primary only
        assert_write_was_lost(sharded(zero=hpz), world)


@case(worlds=(4,))
def hpz_without_its_group_crashes_in_deepspeed(world: World) -> None:
    config = zero3.prepare({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}})
    message = refusal(lambda: deepspeed.initialize(model=tiny(), config=config), AttributeError)
    assert "_set_zero_group_parallelism" in message


def fail_in_the_middle(engine: tezo_ds.Engine, batch: dict) -> None:
    """Runs one step whose forward raises in the second layer."""

    def fail(*args: object) -> None:
        raise InterruptedError("in the middle")

    hook = engine.sharding.module.model.layers[1].mlp.register_forward_pre_hook(fail)
    refusal(lambda: engine.step(batch), InterruptedError)
    hook.remove()


def left_gathered(engine: tezo_ds.Engine) -> int:
    parameters = engine.sharding.module.parameters()
    return sum(p.ds_status != ZeroParamStatus.NOT_AVAILABLE for p in parameters)


@case(worlds=(1, 2, 3))
def a_forward_that_fails_leaves_nothing_behind(world: World) -> None:
    batch = make_batch(7)
    mine = part_of(batch, world.rank, world.size)
    for probe in ("fused", "inplace"):
        engine = sharded(fields={"probe": probe})
        before = [view.local.clone() for view in views_of(engine)]
        engine.loss(mine)
        fail_in_the_middle(engine, mine)
        assert left_gathered(engine) == 0
        assert not any("forward" in module.__dict__ for module in engine.sharding.module.modules())
        for view, original in zip(views_of(engine), before, strict=True):
            assert torch.equal(view.local, original)
        assert_same_run(engine, world, "llama", True, {"probe": probe})

    engine = sharded()
    engine.loss(mine)
    with mock.patch.object(DeepSpeedZeRoOffload, "partition_all_parameters"):
        fail_in_the_middle(engine, mine)
        assert left_gathered(engine) > 0


@case(worlds=(2,))
def a_forward_that_failed_is_over(world: World) -> None:
    engine, batch = sharded(), make_batch(4)
    module = engine.sharding.module
    engine.loss(batch)
    fail_in_the_middle(engine, batch)
    assert module.model.norm.weight.numel() == 0
    assert left_gathered(engine) == 0

    with mock.patch.object(engine.sharding, "forward", lambda **inputs: module(**inputs)):
        fail_in_the_middle(engine, batch)
    engine.sharding._partition()
    assert module.model.norm.weight.numel() == 22  # a gather, for which all ranks must be here


@case(worlds=(2,))
def weights_quantised_on_the_way_are_refused_where_they_matter(world: World) -> None:
    plain = zero3.wrap(tiny(), ZERO3)
    for flag in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        # Set afterwards: DeepSpeed's quantiser itself needs a GPU build.
        with mock.patch.object(plain._config.zero_config, flag, True):
            message = refusal(
                lambda: tezo_ds.initialize(plain, {**FIELDS, "probe": "inplace"}),
                tezo_ds.ShardingError,
            )
            assert flag in message and "fused" in message
            engine = tezo_ds.initialize(plain, {**FIELDS, "probe": "fused"})
            assert flag in refusal(engine.merge, tezo_ds.ShardingError)


@case(worlds=(2,))
def torchs_linear_stays_torchs(world: World) -> None:
    sharded()
    assert F.linear is TORCH_LINEAR
    config = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
    try:
        deepspeed.initialize(model=tiny(), config=config)
        assert F.linear is not TORCH_LINEAR
    finally:
        F.linear = TORCH_LINEAR


@case(worlds=(1, 2))
def what_cannot_train_is_refused(world: World) -> None:
    for stage in (0, 1, 2):
        config = {"zero_optimization": {"stage": stage}, "tezo": FIELDS}
        message = refusal(lambda: tezo_ds.initialize(tiny(), config), tezo_ds.ConfigError)  # noqa: B023
        assert f"stage is {stage}" in message and "set it to 3" in message
    message = refusal(lambda: zero3.check_version("0.19.6"), tezo_ds.ConfigError)
    assert "deepspeed>=0.19.8" in message
    model = tiny()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        config=zero3.prepare({**ZERO3, "zero_allow_untested_optimizer": True}),
    )
    message = refusal(lambda: tezo_ds.initialize(engine, FIELDS), tezo_ds.ShardingError)
    assert "without one" in message
    partitioned = zero3.wrap(tiny(), ZERO3).module
    message = refusal(lambda: tezo_ds.initialize(partitioned, FIELDS), tezo_ds.ConfigError)
    assert "pass a DeepSpeed engine" in message


@case(worlds=(2, 3))
def tied_weights_get_one_direction(world: World) -> None:
    engine = sharded("llama", tied=True)
    names = [matrix.name for matrix in engine.space.matrices]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    untied = [matrix.name for matrix in sharded("llama", tied=False).space.matrices]
    assert "lm_head.weight" in untied and len(untied) == len(names) + 1
