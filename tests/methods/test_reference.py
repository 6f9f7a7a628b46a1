"""The oracles: they apply the directions that they measured, and descend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference_cases import (
    FIELDS,
    LR,
    MATRIX,
    PERIOD,
    RANKS,
    RHO,
    SHAPES,
    STEPS,
    VECTOR,
    W0,
    G,
    changes,
    close,
    curved,
    draws,
    linear,
    quick_draws,
)
from torch import Tensor

from tezo_ds.methods import reference
from tezo_ds.methods.reference import METHODS, run

SGD = ["tezo", "lozo", "mezo"]
pytestmark = pytest.mark.usefixtures(quick_draws.__name__)


@pytest.mark.parametrize("method", METHODS)
def test_slopes_are_those_of_the_directions(method: str) -> None:
    records = list(run(method, W0, linear, STEPS, LR, RHO, queries=3, **FIELDS))
    assert [record.step for record in records] == list(range(STEPS))
    for record in records:
        assert len(record.kappas) == 3
        for q, kappa in enumerate(record.kappas):
            Z = {name: draws(method[:4], name, record.step, q) for name in SHAPES}
            assert kappa == pytest.approx(linear(0, Z), rel=1e-9)


def descents(method: str, **fields: Any) -> list[float]:
    """Returns ⟨G, Δ⟩ ÷ mean κ² of each step on the linear loss: how far a step goes along what it
    measured."""
    records = list(run(method, W0, linear, STEPS, LR, RHO, **{**FIELDS, **fields}))
    moved = {name: changes(records, name) for name in SHAPES}
    return [
        linear(0, {name: moved[name][i] for name in SHAPES})
        * len(record.kappas)
        / sum(kappa**2 for kappa in record.kappas)
        for i, record in enumerate(records)
    ]


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("method", SGD)
def test_what_is_applied_is_what_was_measured(method: str, queries: int) -> None:
    assert descents(method, queries=queries) == pytest.approx([-LR] * STEPS, rel=1e-9)


def off_steps(method: str) -> list[int]:
    return [i for i, d in enumerate(descents(method)) if d != pytest.approx(-LR, rel=1e-6)]


def applying(monkeypatch: pytest.MonkeyPatch, kind: Any, name: str, method: Any) -> None:
    """Makes updates, but not perturbations, of this kind of parameter use another method of that name."""
    descent = kind.descent

    def mutated(self: Any, step: int, kappas: list[float]) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, method)
            return descent(self, step, kappas)

    monkeypatch.setattr(kind, "descent", mutated)


def test_a_direction_never_measured_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle is caught that draws another U for the update than for the perturbation at refresh steps,
    as a public LOZO code does."""
    left = reference._Lozo.left

    def redrawn(self: Any, step: int, q: int) -> Tensor:
        return left(self, step, q + 1 if step % PERIOD == 0 else q)

    assert off_steps("lozo") == []
    applying(monkeypatch, reference._Lozo, "left", redrawn)
    assert off_steps("lozo") == [0, 3, 6]


def test_an_update_in_the_old_basis_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    basis = reference._Tezo.basis

    def old(self: Any, step: int) -> tuple[Tensor, Tensor]:
        return basis(self, max(0, step - 1))

    assert off_steps("tezo") == []
    applying(monkeypatch, reference._Tezo, "basis", old)
    assert off_steps("tezo") == [3, 6]


def test_rank_scaling_divides_by_the_rank() -> None:
    plain, scaled = (
        list(run("lozo", W0, linear, 1, LR, RHO, rank_scaling=scaling, **FIELDS))
        for scaling in (False, True)
    )
    for name, r in {**RANKS, VECTOR: 1}.items():  # a vector has none
        assert close(changes(scaled, name)[0] * r, changes(plain, name)[0])


@pytest.mark.parametrize("method", METHODS)
def test_scale_of_the_loss(method: str) -> None:
    """Adam does not see the scale of the loss; the others move as if the learning rate had it. Exact for a
    power of two."""
    fields = {"eps": 0.0, **FIELDS}
    lr = LR if "adam" in method else LR / 1024
    plain = run(method, W0, curved, STEPS, LR, RHO, **fields)
    scaled = run(method, W0, lambda *at: 1024 * curved(*at), STEPS, lr, RHO, **fields)
    for one, other in zip(plain, scaled, strict=True):
        assert [1024 * kappa for kappa in one.kappas] == other.kappas
        assert all(torch.equal(one.weights[name], other.weights[name]) for name in SHAPES)


LEARNING_RATES = {
    **{"tezo": 0.002, "tezo-m": 0.002, "tezo-adam": 0.01, "tezo-adam-coef": 0.01},
    **{"lozo": 0.002, "lozo-m": 0.002},
    **{"mezo": 0.005, "mezo-m": 0.005, "mezo-adam": 0.02},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_quadratic_falls(method: str) -> None:
    target = {name: G[name] for name in (MATRIX, VECTOR)}
    start = {name: W0[name] for name in target}

    def distance(step: int, weights: dict[str, Tensor]) -> float:
        return sum(float((w - target[name]).square().sum()) / 2 for name, w in weights.items())

    fields = {"refresh_every": 50, "rank": 3}
    *_, last = run(method, start, distance, 200, LEARNING_RATES[method], 1e-3, **fields)
    assert distance(0, last.weights) < 0.8 * distance(0, start)


def test_contract_of_a_run() -> None:
    start = {name: w.bfloat16().requires_grad_() for name, w in W0.items()}
    before = {name: w.detach().clone() for name, w in start.items()}
    calls: list[int] = []

    def watched(step: int, weights: dict[str, Tensor]) -> float:
        calls.append(step)
        assert {name: tuple(w.shape) for name, w in weights.items()} == SHAPES
        assert all(w.dtype == torch.float64 and not w.requires_grad for w in weights.values())
        return linear(step, weights)

    one, two = run("tezo-m", start, watched, 2, LR, RHO, queries=3)
    assert calls == [0] * 6 + [1] * 6
    assert all(torch.equal(start[name], before[name]) for name in SHAPES)
    assert all(not torch.equal(one.weights[name], two.weights[name]) for name in SHAPES)
    assert {name: tuple(w.shape) for name, w in two.weights.items()} == SHAPES
    with pytest.raises(ValueError, match="'lozo-adam' is none of tezo, tezo-m, "):
        run("lozo-adam", start, watched, 2, LR, RHO)
    with pytest.raises(TypeError, match="beta"):
        run("tezo", start, watched, 2, LR, RHO, beta=1)


@pytest.mark.parametrize(("method", "rank"), [("tezo", 16), ("lozo-m", 2)])
def test_default_ranks(method: str, rank: int) -> None:
    for given, same in ((rank, True), (rank + 1, False)):
        default = next(run(method, W0, linear, 1, LR, RHO))
        explicit = next(run(method, W0, linear, 1, LR, RHO, rank=given))
        assert torch.equal(default.weights[MATRIX], explicit.weights[MATRIX]) == same
