"""`rho: auto`: the signs of slopes are right at the chosen ρ, and no longer far below or above it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from radius_losses import Losses
from tiny import make_batch, tiny
from torch import Tensor

import tezo_ds
from tezo_ds.auto.radius import DIRECTIONS, START, choose_rho
from tezo_ds.config import TezoConfig
from tezo_ds.directions.branches import Ask, Branches
from tezo_ds.engine.engine import Engine
from tezo_ds.errors import ProbeError
from tezo_ds.losses.objective import Objective
from tezo_ds.sharding import sharding_of

COUNT = 32
FEW = ("*v_proj*",)
WAYS = [
    {"include": FEW, "probe": "inplace"},
    {"include": FEW, "method": "lozo"},
    {"include": FEW, "method": "mezo"},
]


def losses_in(dtype: torch.dtype, seed: int = 0, **fields: object) -> Losses:
    """Makes the losses of a model with bfloat16's weights and directions, computed in another dtype."""
    model = tiny("llama", seed=seed).bfloat16().to(dtype)
    config = TezoConfig.model_validate({"rank": 3, "seed": seed, **fields})
    engine = Engine(sharding_of(model, None), config, None, torch.bfloat16)
    return Losses(engine, make_batch(12, seed=seed))


def signs_that_agree(kappa: Tensor, reference: Tensor) -> float:
    """Returns the share of equal signs where the reference's |κ| is above its median."""
    large = reference.abs() > reference.abs().median()
    return (kappa.sign() == reference.sign())[large].double().mean().item()


def reference_of(**fields: object) -> Tensor:
    exact = losses_in(torch.float32, **fields)
    return exact.kappa(COUNT, choose_rho(exact, torch.float32).rho)


@pytest.mark.parametrize("seed", range(3))
def test_signs_in_bfloat16_are_those_of_float32(seed: int) -> None:
    reference, losses = reference_of(seed=seed), losses_in(torch.bfloat16, seed)
    rho = choose_rho(losses, torch.bfloat16).rho
    shares = [
        signs_that_agree(losses.kappa(COUNT, rho * factor), reference)
        for factor in (1 / 300, 1, 100)
    ]
    assert shares[1] >= 0.95
    assert max(shares[0], shares[2]) < 0.95


@pytest.mark.parametrize("fields", WAYS)
def test_signs_are_right_with_every_probe_and_kind_of_direction(fields: dict) -> None:
    losses = losses_in(torch.bfloat16, **fields)
    radius = choose_rho(losses, torch.bfloat16)
    assert losses.branches <= 7 * 2 * DIRECTIONS
    assert signs_that_agree(losses.kappa(COUNT, radius.rho), reference_of(**fields)) >= 0.95


@pytest.mark.parametrize("seed", range(2))
def test_what_it_says_of_the_error_is_so(seed: int) -> None:
    reference, losses = reference_of(seed=seed), losses_in(torch.bfloat16, seed)
    radius = choose_rho(losses, torch.bfloat16)
    below, here, above = (
        (losses.kappa(COUNT, radius.rho * factor) - reference).square().mean().sqrt()
        for factor in (1 / 8, 1, 8)
    )
    assert here < min(below, above)
    assert radius.error / 4 < here < 4 * radius.error
    assert radius.slope / 2 < reference.square().mean().sqrt() < 2 * radius.slope


def test_float32_takes_a_smaller_radius_and_is_nearly_exact() -> None:
    radius = choose_rho(losses_in(torch.float32), torch.float32)
    assert 1e-5 < radius.rho < 1e-3 < choose_rho(losses_in(torch.bfloat16), torch.bfloat16).rho
    reference = losses_in(torch.float64).kappa(COUNT, 1e-4)
    error = (losses_in(torch.float32).kappa(COUNT, radius.rho) - reference).square().mean().sqrt()
    assert error < 2e-3 * radius.slope


def of_function(along: Callable[[int, float], float]) -> Callable[[Ask], Tensor]:
    """Makes a function that returns losses from one of (direction, signed ρ)."""
    return lambda ask: torch.tensor(
        [along(q or 0, sign * ask.rho) for q, sign in ask.signs], dtype=torch.float64
    )


@pytest.mark.parametrize("sigma", [1e-6, 1e-3])
@pytest.mark.parametrize("central", [True, False])
def test_known_noise_and_bend_give_the_best_radius(sigma: float, central: bool) -> None:
    slope, second, third = 3.0, 40.0, 5000.0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)

        def along(q: int, x: float, generator: torch.Generator = generator) -> float:
            noise = sigma * torch.randn((), generator=generator).item()
            way = 1 - 2 * (q % 2)
            return 7 + way * slope * x + second * x**2 / 2 + way * third * x**3 / 6 + noise

        radius = choose_rho(of_function(along), torch.float32, central)
        best = (sigma / math.sqrt(2) / (math.sqrt(2) * third / 6)) ** (1 / 3)
        best = best if central else math.sqrt(math.sqrt(2) * sigma / (second / 2))
        assert best / 2 < radius.rho < 2 * best
        assert sigma / 4 < radius.noise < 4 * sigma


def test_weights_that_round_want_a_larger_radius() -> None:
    """In place, W + ρZ itself is rounded, and the radius is larger; with the fused probe W is never
    rounded."""
    generator = torch.Generator().manual_seed(0)
    W, G = torch.randn(2, 400, generator=generator).bfloat16().double()
    Z = torch.randn(DIRECTIONS, 400, generator=generator).double()

    def loss(weights: Tensor) -> float:
        return (torch.tanh(weights) @ G).float().item()

    fused = choose_rho(of_function(lambda q, x: loss(W + x * Z[q])), torch.bfloat16)
    inplace = choose_rho(
        of_function(lambda q, x: loss((W + x * Z[q]).bfloat16().double())), torch.bfloat16
    )
    assert inplace.rho > 4 * fused.rho
    assert inplace.noise > 100 * fused.noise


@pytest.mark.parametrize("method", ["tezo-m", "lozo-m", "mezo-m"])
@pytest.mark.parametrize("chunk", [0, 1])
def test_a_run_goes_on_as_if_nothing_had_been_measured(method: str, chunk: int) -> None:
    fields = {"method": method, "rank": 3, "lr": 1e-3, "include": FEW, "branch_chunk": chunk}
    states, rho = [], "auto"
    for _ in range(2):
        engine = tezo_ds.initialize(tiny("llama").bfloat16(), {**fields, "rho": rho})
        assert engine.radius is None
        reports = [engine.step(make_batch(4, seed=step)) for step in range(3)]
        assert (engine.radius is None) == (rho != "auto")
        assert len({report.rho for report in reports}) == 1
        rho = reports[0].rho
        states.append(engine.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("probe", ["fused", "inplace"])
def test_a_run_is_replayed_without_choosing(probe: str) -> None:
    fields = {"rank": 3, "lr": 1e-3, "include": FEW, "rho": "auto", "probe": probe}
    fields |= {"restore": "subtract"}
    engine, again = (tezo_ds.initialize(tiny("llama").bfloat16(), fields) for _ in range(2))
    for step in range(3):
        report = engine.step(make_batch(4, seed=step))
        again.replay(step, report.kappa, report.lr, report.rho)
    assert again.radius is None
    replayed, own = again.state_dict(), engine.state_dict()
    assert all(torch.equal(replayed[name], own[name]) for name in own)
    last, other = (e.step(make_batch(4)) for e in (engine, again))
    assert (last.kappa, last.rho) == (other.kappa, other.rho)


def test_it_takes_no_more_branches_at_once_than_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tezo_ds.initialize(tiny("llama"), {"rank": 3, "rho": "auto", "include": FEW})
    sizes, measure = [], engine.probe.measure

    def counting(objective: Objective, batch: dict[str, Tensor], branches: Branches) -> Tensor:
        sizes.append(len(branches))
        return measure(objective, batch, branches)

    monkeypatch.setattr(engine.probe, "measure", counting)
    engine.step(make_batch(4))
    assert set(sizes) == {2} and len(sizes) > 12


def test_to_restore_by_subtracting_would_change_weights() -> None:
    engine = tezo_ds.initialize(
        tiny("llama").bfloat16(), {"method": "mezo", "include": ["*v_proj*"]}
    )
    for copies in (True, False):
        losses, before = Losses(engine, make_batch(5)), engine.state_dict()
        before = {name: weight.clone() for name, weight in before.items()}
        engine.probe.copies = copies
        choose_rho(losses, torch.bfloat16)
        after = engine.state_dict()
        assert copies == all(torch.equal(before[name], after[name]) for name in before)


def test_losses_that_are_not_finite_bound_it() -> None:
    def along(q: int, x: float) -> float:
        return math.inf if abs(x) > 1e-3 else 5 + x + 1e-7 * math.sin(1e9 * x + q)

    radius = choose_rho(of_function(along), torch.float32)
    assert START < radius.rho <= 1e-3


@pytest.mark.parametrize("size", [0.0, 1e-3])
def test_slopes_that_are_noise_are_refused(size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = of_function(lambda q, x: 5 + size * torch.randn((), generator=generator).item())
    with pytest.raises(ProbeError, match=r"^rho auto: .* set rho"):
        choose_rho(noise, torch.bfloat16)
