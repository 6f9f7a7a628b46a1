"""Ended periods that stay beside the weights: the same run as one that writes them, and nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import make_batch, tiny

import tezo_ds
from tezo_ds.errors import ConfigError
from tezo_ds.export.adapter import save_adapter
from tezo_ds.plan.needs import factor_numel

FIELDS: dict[str, Any] = {
    "rank": 3, "lr": 3e-3, "rho": 1e-2, "refresh_every": 2, "seed": 5, "queries": 2, "train_vectors": True,
}  # fmt: skip


def after(steps: int, **more: Any) -> tezo_ds.Engine:
    engine = tezo_ds.initialize(tiny().double(), {**FIELDS, **more})
    for step in range(steps):
        engine.step(make_batch(3, seed=step))
    return engine


@pytest.mark.parametrize(
    ("probe", "placement"), [("fused", "shared"), ("inplace", "shared"), ("fused", "per_example")]
)
def test_the_run_is_that_which_writes_its_periods(probe: str, placement: str) -> None:
    more = {"probe": probe, "placement": placement, "method": "tezo-adam-coef"}
    written, kept = after(7, **more), after(7, **more, keep_periods=3)
    base = tiny().double().state_dict()
    moved = kept.sharding.module.state_dict()
    assert all(torch.equal(moved[name], base[name]) for name in base) and not kept.method.writes
    ours, theirs = kept.coefficients(), written.coefficients()
    for name, expected in theirs.items():
        assert expected.dim() == 1 or len(expected) == 4, "three periods ended, and one goes on"
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-9)
    for name, expected in written.state_dict().items():
        torch.testing.assert_close(kept.state_dict()[name], expected, rtol=1e-6, atol=1e-9)


def test_a_result_is_loaded_exported_and_merged_without_a_write_before(tmp_path: Path) -> None:
    engine = after(5, keep_periods=2, train_vectors=False)
    other = after(0, keep_periods=2, train_vectors=False)
    other.load_coefficients(engine.coefficients())
    batch = make_batch(3, seed=9)
    assert engine.loss(batch) == other.loss(batch) != after(0).loss(batch)
    save_adapter(engine, tmp_path / "adapter", "the base")
    adapted = PeftModel.from_pretrained(tiny().double(), tmp_path / "adapter")
    ids = torch.arange(5, 12)[None]
    with torch.no_grad(), engine.applied():
        expected = engine.sharding.module(ids).logits
        torch.testing.assert_close(adapted(ids).logits, expected, rtol=0, atol=1e-5)
    before = engine.loss(batch)
    engine.merge()
    assert engine.loss(batch) == pytest.approx(before, rel=1e-9)
    assert not any(part.any() for part in engine.coefficients().values())
    for step in range(5, 6):
        engine.step(make_batch(3, seed=step))
    assert engine.loss(batch) != before


def test_a_plan_counts_what_the_factors_hold() -> None:
    kept, run = after(0, keep_periods=2), after(0)
    counts = [factor_numel(e.method, e.config, e.space.matrices) for e in (run, kept)]
    held = [
        sum(part.numel() for name in e.space.slices if name in e.method.factors.matrices
            for part in e.method.factors.of(name))
        for e in (run, kept)
    ]  # fmt: skip
    assert counts == held and held[1] == 3 * held[0]


def test_more_periods_than_stay_are_refused_and_nothing_is_lost() -> None:
    engine = after(4, keep_periods=1)
    batch, learnt = make_batch(3, seed=4), engine.coefficients()
    loss = engine.loss(batch)
    with pytest.raises(
        ConfigError, match="keep_periods: 1 have ended, and steps go on; raise keep"
    ):
        engine.step(batch)
    assert engine.loss(batch) == loss and engine.step_index == 4
    assert all(torch.equal(part, learnt[name]) for name, part in engine.coefficients().items())


@pytest.mark.parametrize(
    ("more", "telling"),
    [
        ({"refresh_every": 0}, "keep_periods: are ended by refresh_every, which is 0"),
        ({"method": "tezo-adam"}, "keep_periods: tezo-adam writes weights in every step"),
        (
            {"total_steps": 9},
            "keep_periods: 4 periods of 2 steps end before step 9, and 3 can stay",
        ),
    ],
)
def test_what_does_not_go_together(more: dict[str, Any], telling: str) -> None:
    with pytest.raises(ConfigError, match=telling):
        after(0, **{**FIELDS, "keep_periods": 3, **more})
    after(0, keep_periods=3, total_steps=8)
