"""Coefficients by parameter name: saved after refreshes and loaded, they give the same weights again."""

from __future__ import annotations

import pytest
import torch
from tiny import make_batch, tiny
from torch import Tensor

import tezo_ds

FIELDS = {"rank": 3, "rho": 1e-2, "lr": 3e-3, "seed": 5, "refresh_every": 2}
STEPS = 5  # two whole periods and a step


def after_steps(dtype: torch.dtype, fields: dict) -> tezo_ds.Engine:
    engine = tezo_ds.initialize(tiny().to(dtype), fields)
    for step in range(STEPS):
        engine.step(make_batch(3, seed=step))
    return engine


def weights(engine: tezo_ds.Engine) -> dict[str, Tensor]:
    return dict(engine.sharding.module.state_dict())


def assert_same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"method": "tezo-m", "probe": "inplace"},
        {"train_vectors": True, "probe": "inplace"},
        {"stochastic_rounding": False},
    ],
    ids=str,
)
def test_ended_periods_are_written_as_the_run_wrote_them(more: dict, dtype: torch.dtype) -> None:
    fields = {**FIELDS, **more}
    engine = after_steps(dtype, fields)
    saved = engine.coefficients()
    for name, part in saved.items():
        vector = engine.sharding.module.get_parameter(name).dim() == 1
        assert part.shape == ((22,) if vector else (3, 3)) and bool(part.any())
    other = tezo_ds.initialize(tiny().to(dtype), {**fields, "refresh_every": 0})
    before = {name: tensor.clone() for name, tensor in weights(other).items()}
    other.load_coefficients(saved)
    assert_same_weights(weights(other), weights(engine))
    batch = make_batch(4)
    assert other.loss(batch) == engine.loss(batch)
    assert all(torch.equal(saved[name], part) for name, part in other.coefficients().items())
    names = [matrix.name for matrix in engine.space.matrices]
    assert not any(torch.equal(before[name], weights(engine)[name]) for name in names)


def test_coefficients_of_several_periods_load_only_where_they_belong() -> None:
    saved = after_steps(torch.float32, FIELDS).coefficients()
    engine = tezo_ds.initialize(tiny(), FIELDS)
    engine.load_coefficients(saved)
    reached = {name: tensor.clone() for name, tensor in weights(engine).items()}
    for again in (saved, {name: rows[-1] for name, rows in saved.items()}):
        with pytest.raises(tezo_ds.ConfigError, match="cannot be loaded here"):
            engine.load_coefficients(again)  # the weights hold ended periods already
    assert_same_weights(weights(engine), reached)
    with pytest.raises(tezo_ds.ConfigError, match="cannot be loaded here"):
        tezo_ds.initialize(tiny(), {"rank": 3, "method": "lozo"}).load_coefficients(saved)
    name = min(saved)
    with pytest.raises(tezo_ds.ConfigError, match="6 coefficients, but rank is 3 in each of 3 per"):
        tezo_ds.initialize(tiny(), FIELDS).load_coefficients({**saved, name: saved[name][:2]})
    engine = tezo_ds.initialize(tiny(), FIELDS)
    engine.sharding.quantised = "zero_quantized_weights"
    with pytest.raises(tezo_ds.ShardingError, match="zero_quantized_weights"):
        engine.load_coefficients(saved)


@pytest.mark.parametrize(
    "more",
    [
        {"method": "tezo-adam", "refresh_every": 2},
        {"method": "lozo-m", "nu": 2, "queries": 2},
        {"method": "mezo", "restore": "copy"},
        {"method": "mezo-adam"},  # restores by subtracting, which leaves its rounding errors
        {"method": "tezo-m", "refresh_every": 2},
    ],
    ids=str,
)
def test_slopes_alone_give_the_weights_again(more: dict) -> None:
    fields = {**FIELDS, "lr": 3e-4, "refresh_every": 0, **more}
    engine = tezo_ds.initialize(tiny().bfloat16(), fields)
    reports = [engine.step(make_batch(3, seed=step)) for step in range(STEPS)]
    other = tezo_ds.initialize(tiny().bfloat16(), fields)
    for report in reports:
        other.replay(report.step, report.kappa, report.lr, report.rho)
    assert_same_weights(weights(other), weights(engine))
    assert other.loss(make_batch(4)) == engine.loss(make_batch(4))


def test_rounding_errors_of_subtracting_are_part_of_a_result() -> None:
    """Hazard: a replay that leaves out the rounding errors of subtracting ends elsewhere than the run did."""
    fields = {"method": "mezo", "lr": 3e-4, "rho": 1e-2}
    engine, exact = (tezo_ds.initialize(tiny().bfloat16(), fields) for _ in range(2))
    exact.probe.copies = True
    for step in range(STEPS):
        report = engine.step(make_batch(3, seed=step))
        exact.replay(step, report.kappa, report.lr, report.rho)
    ours, theirs = weights(engine), weights(exact)
    assert any(
        not torch.equal(ours[matrix.name], theirs[matrix.name]) for matrix in engine.space.matrices
    )
