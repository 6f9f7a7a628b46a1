"""Data-parallel replicas: equal to one process, one small all-reduce a step, nothing else on the wire."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from once import once
from tiny import make_batch, part_of, tiny
from worlds import World, case

import tezo_ds

FIELDS = {"rank": 3, "rho": 1e-2, "lr": 1e-3, "queries": 2, "seed": 5}
STEPS = 3  # and a forward: from the third on, hazards of sharding have all shown


def alone(kind: str, tied: bool, fields: dict, **kwargs: object) -> tezo_ds.Engine:
    """Makes a reference engine that sees the whole batch in this process and communicates with nobody."""
    engine = tezo_ds.initialize(tiny(kind, tied, **kwargs), {**FIELDS, **fields})
    engine.sharding.world_size = 1
    return engine


@once
def steps_alone(what: str) -> tuple[list[tezo_ds.StepReport], torch.Tensor, float]:
    """Returns reports, coefficients and the last batch's loss after them, of the reference that `alone`
    makes of these arguments, as JSON."""
    kind, tied, fields, sizes = json.loads(what)
    reference = alone(kind, tied, fields, **sizes)
    batches = [make_batch(7, seed=step) for step in range(STEPS)]
    reports = [reference.step(batch) for batch in batches]
    return reports, reference.method.coefficients, reference.loss(batches[-1])


def assert_same_run(
    engine: tezo_ds.Engine, world: World, kind: str, tied: bool, fields: dict, **sizes: int
) -> None:
    """Asserts that the engine's steps over all ranks are those of a process alone with all examples."""
    known = steps_alone(json.dumps([kind, tied, fields, sizes], sort_keys=True))
    reports, coefficients, loss_after = known
    for step, theirs in enumerate(reports):
        batch = make_batch(7, seed=step)
        ours = engine.step(part_of(batch, world.rank, world.size))
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(ours.kappa, theirs.kappa, rtol=5e-3, atol=5e-3)
        assert ours.step == theirs.step == step
    largest = coefficients.abs().max()
    assert largest > 1e-3
    found = engine.method.coefficients
    torch.testing.assert_close(found, coefficients, rtol=1e-2, atol=2e-4 * largest)
    loss = engine.loss(part_of(batch, world.rank, world.size))
    torch.testing.assert_close(loss, loss_after, rtol=1e-4, atol=0)


def assert_equal_on_all_ranks(tensor: torch.Tensor) -> None:
    """Asserts that a tensor has the very same bits on all ranks."""
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    assert all(torch.equal(tensor, other) for other in gathered)


@contextlib.contextmanager
def recorded_collectives() -> Iterator[list[tuple[str, int]]]:
    """Context manager: collectives through torch.distributed are recorded inside; yields their names and
    bytes."""
    calls: list[tuple[str, int]] = []
    with contextlib.ExitStack() as stack:
        for name in ("all_reduce", "broadcast", "all_gather", "all_gather_object", "barrier",
                     "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast_object_list"):  # fmt: skip
            original = getattr(dist, name)

            def record(*args, _name=name, _original=original, **kwargs):
                tensor = next((a for a in args if isinstance(a, torch.Tensor)), None)
                calls.append((_name, 0 if tensor is None else tensor.numel() * tensor.itemsize))
                return _original(*args, **kwargs)

            stack.enter_context(mock.patch.object(dist, name, record))
        yield calls


@case(worlds=(1, 2, 3))
def replicas_run_as_one_process(world: World) -> None:
    for probe in ("fused", "inplace"):
        for method in ("tezo", "tezo-m"):
            fields = {"probe": probe, "method": method}
            engine = tezo_ds.initialize(tiny("llama", tied=True), {**FIELDS, **fields})
            assert engine.sharding.world_size == world.size
            assert_same_run(engine, world, "llama", True, fields)
            assert_equal_on_all_ranks(engine.method.coefficients)


@case(worlds=(2, 3))
def a_step_sends_sixteen_bytes_a_branch_and_eight(world: World) -> None:
    for probe in ("fused", "inplace"):
        engine = tezo_ds.initialize(tiny(), {**FIELDS, "probe": probe})
        batch = part_of(make_batch(5), world.rank, world.size)
        engine.step(batch)
        with recorded_collectives() as calls:
            engine.step(batch)
        assert calls == [("all_reduce", 16 * 2 * FIELDS["queries"] + 8)], calls


@case(worlds=(2,))
def a_rank_without_labels_takes_part(world: World) -> None:
    batch = make_batch(4)
    mine = {key: value.clone() for key, value in batch.items()}
    if world.rank == 1:
        mine["labels"][:] = -100
    engine = tezo_ds.initialize(tiny(), FIELDS)
    reference = alone("llama", True, {})
    for _ in range(3):
        ours, theirs = engine.step(mine), reference.step(batch)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)


@case(worlds=(2,))
def a_loss_that_stays_nan_on_one_rank_stops_all(world: World) -> None:
    def loss_fn(outputs, batch):
        loss_sum = outputs.logits.float().sum(dim=(1, 2))
        return loss_sum * (float("nan") if world.rank == 1 else 1.0), torch.ones(len(loss_sum))

    engine = tezo_ds.initialize(tiny(), FIELDS, loss_fn=loss_fn)
    for _ in range(4):
        assert engine.step(make_batch(2)).dropped == FIELDS["queries"]
    try:
        engine.step(make_batch(2))
    except tezo_ds.ProbeError as error:
        assert "step 4: loss is nan" in str(error) and "\n" not in str(error)
    else:
        raise AssertionError("a NaN loss was accepted")
    assert not engine.method.coefficients.any()
