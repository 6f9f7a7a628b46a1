"""Steps of tezo-gn: those of the oracle, replayed without a forward, and refusals."""

from __future__ import annotations

import functools

import pytest
import torch
from gauss_newton_oracle import run
from tiny import make_batch, tiny
from torch import Tensor

import tezo_ds
from tezo_ds.errors import ConfigError

FIELDS = {"method": "tezo-gn", "rank": 3, "seed": 7, "rho": 1e-2, "queries": 4, "damping": 0.2}
STEPS = 6


def batch_of(step: int) -> dict[str, Tensor]:
    return make_batch(7, seed=step)


@functools.cache
def expected(steps: int = STEPS) -> dict[str, Tensor]:
    """Returns the oracle's weights after some steps of a model in float64."""
    model = tiny("llama", tied=False).double()

    def logits(step: int, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        batch = batch_of(step)
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        found = torch.func.functional_call(model, weights, (), inputs).logits[:, :-1].flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        return found[labels != -100], labels[labels != -100]

    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    with torch.no_grad():
        *_, last = run(weights, logits, steps, 4, 3, 7, 1e-2, 0.2, (0.25, 0.5, 1.0))
    return last


def assert_the_oracles(found: dict[str, Tensor], close: float = 1e-5) -> None:
    before = tiny("llama", tied=False).double().state_dict()
    for name, weight in expected().items():
        change, theirs = found[name] - before[name], weight - before[name]
        assert theirs.abs().max() > 1e-4
        torch.testing.assert_close(change, theirs, rtol=0, atol=close * float(theirs.abs().max()))


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_steps_are_the_oracles(micro_batch: int) -> None:
    engine = tezo_ds.initialize(
        tiny("llama", tied=False).double(), {**FIELDS, "micro_batch": micro_batch}
    )
    reports = [engine.step(batch_of(step)) for step in range(STEPS)]
    assert_the_oracles(engine.state_dict())
    # Replayed by what was solved for, to the bit.
    again = tezo_ds.initialize(tiny("llama", tied=False).double(), FIELDS)
    for report in reports:
        again.replay(report.step, report.kappa, report.lr, report.rho, report.solved)
    assert torch.equal(again.method.coefficients, engine.method.coefficients)
    with pytest.raises(ConfigError, match="disagree on solved"):
        again.replay(STEPS, [1.0] * 4, 1.0, 1e-2)


def test_one_sided_differences_and_choices_go_down() -> None:
    for difference in ("central", "forward"):
        engine = tezo_ds.initialize(tiny("llama"), {**FIELDS, "difference": difference})
        engine.objective.choices = torch.arange(5, 61)
        batch = make_batch(16)
        before = engine.loss(batch)
        for _ in range(8):
            engine.step(batch)
        assert engine.loss(batch) < before - 0.01


def test_late_layers_step_alike_with_and_without_their_trunk() -> None:
    found = []
    for shared in (True, False):
        fields = {**FIELDS, "include": ("last:1",), "shared_trunk": shared}
        engine = tezo_ds.initialize(tiny("llama").double(), fields)
        for step in range(3):
            engine.step(make_batch(200, seed=step))
        found.append(engine.method.coefficients)
    assert found[0].abs().max() > 1e-3
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)


def test_what_it_cannot_do_is_refused() -> None:
    for field, value in {
        "probe": "inplace", "placement": "per_rank", "branch_chunk": 2, "memory_budget": 1.0,
        "clip_kappa": 0.9,
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=f"{field}: tezo-gn needs all branches"):
            tezo_ds.initialize(tiny(), {**FIELDS, field: value})
    with pytest.raises(ConfigError, match="solves by the changes of logits"):
        tezo_ds.initialize(tiny(), FIELDS, lambda outputs, batch: (outputs, outputs))
    assert tezo_ds.TezoConfig(method="tezo-gn").lr == 1.0
    assert tezo_ds.TezoConfig(method="tezo-gn", lr=0.5).lr == 0.5
    assert tezo_ds.TezoConfig().lr == 1e-6


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    engine = tezo_ds.initialize(tiny(), {**FIELDS, "rho": 1e39})
    report = engine.step(make_batch(4))
    assert report.dropped == 4 and report.solved == (0.0,) * 4
    assert not engine.method.coefficients.any()
