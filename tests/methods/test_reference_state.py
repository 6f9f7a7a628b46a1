"""The state of the oracles: momentum and Adam against torch's optimizers and naive loops, and refreshes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from reference_cases import (
    FIELDS,
    LR,
    MATRIX,
    PERIOD,
    RANKS,
    RHO,
    RULES,
    SEED,
    SHAPES,
    STEPS,
    VECTOR,
    W0,
    changes,
    close,
    curved,
    factors,
    fresh_left,
    gradients,
    quick_draws,
    tau,
)
from torch import Tensor

from tezo_ds.methods.reference import METHODS, Record, run

pytestmark = pytest.mark.usefixtures(quick_draws.__name__)


def torch_path(kind: str, name: str, gradient: list[Tensor]) -> Iterator[Tensor]:
    """Yields the weights after each step of torch's own optimizer."""
    weight = W0[name].clone().requires_grad_()
    optimizer: torch.optim.Optimizer = torch.optim.SGD([weight], LR)
    if kind == "m":
        optimizer = torch.optim.SGD([weight], LR, momentum=0.8, dampening=0.8)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()  # torch does not dampen the first gradient
    elif kind:
        optimizer = torch.optim.Adam([weight], LR, betas=(0.7, 0.9), eps=1e-3)
    for weight.grad in gradient:
        optimizer.step()
        yield weight.detach().clone()


@pytest.mark.parametrize("method", METHODS)
def test_dense_rules_are_those_of_torch(method: str) -> None:
    """Torch's rules hold for vectors under every method, refreshes or not, and for MeZO's matrices."""
    family, _, kind = method.partition("-")
    records = list(run(method, W0, curved, STEPS, LR, RHO, queries=2, **RULES, **FIELDS))
    for name in SHAPES if family == "mezo" else [VECTOR]:
        path = torch_path(kind, name, gradients(records, family, name))
        for record, expected in zip(records, path, strict=True):
            assert close(record.weights[name], expected)


def test_adam_without_bias_correction_starts_from_zero() -> None:
    betas, eps = (0.7, 0.9), 1e-3
    off = {"bias_correction": False, **RULES}
    records = list(run("mezo-adam", W0, curved, 1, LR, RHO, **off, **FIELDS))
    for name in SHAPES:
        g = gradients(records, "mezo", name)[0]
        expected = -LR * (1 - betas[0]) * g / (math.sqrt(1 - betas[1]) * g.abs() + eps)
        assert close(changes(records, name)[0], expected)


def naive_tezo(
    kind: str, records: list[Record], corrected: bool, restart: bool, crossed: bool = False
) -> Iterator[Tensor]:
    """Yields Δ of MATRIX in loops over elements; `crossed` keeps the cross terms of TeZO-Adam's square."""
    (m, n), r = (6, 4), RANKS[MATRIX]
    (b1, b2), b, eps = RULES["betas"], RULES["momentum"], RULES["eps"]
    t, M, V2 = 0, [0.0] * r, [0.0] * r
    full = torch.zeros(m, n, dtype=torch.float64)  # second moment with the cross terms
    for record in records:
        if restart and record.step % PERIOD == 0:
            t, M, V2 = 0, [0.0] * r, [0.0] * r
        t += 1
        U, V = factors(MATRIX, SHAPES[MATRIX], r, SEED + record.step // PERIOD)
        U, V = U.double(), V.double()
        U_rows, V_rows = U.tolist(), V.tolist()
        Q, g = len(record.kappas), [0.0] * r
        for q, kappa in enumerate(record.kappas):
            c = tau(MATRIX, r, SEED, record.step, q).tolist()
            g = [g[s] + kappa * c[s] / Q for s in range(r)]
        first = b if kind == "m" else b1
        M = [first * M[s] + (1 - first) * g[s] for s in range(r)]
        V2 = [b2 * V2[s] + (1 - b2) * g[s] ** 2 for s in range(r)]
        full = b2 * full + (1 - b2) * ((U * torch.tensor(g, dtype=torch.float64)) @ V.T) ** 2
        by_m, by_v = (1 - b1**t, 1 - b2**t) if corrected else (1.0, 1.0)
        delta = torch.zeros(m, n, dtype=torch.float64)
        for i, j in itertools.product(range(m), range(n)):
            ij = [U_rows[i][s] * V_rows[j][s] for s in range(r)]
            if kind == "m":
                delta[i, j] = sum(ij[s] * M[s] for s in range(r))
            elif kind == "adam":
                mean = sum(ij[s] * M[s] for s in range(r)) / by_m
                square = sum(ij[s] ** 2 * V2[s] for s in range(r))
                square = (float(full[i, j]) if crossed else square) / by_v
                delta[i, j] = mean / (math.sqrt(square) + eps)
            else:
                delta[i, j] = sum(
                    ij[s] * (M[s] / by_m) / (math.sqrt(V2[s] / by_v) + eps) for s in range(r)
                )
        yield (-LR * delta).view(SHAPES[MATRIX])


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("method", ["tezo-m", "tezo-adam", "tezo-adam-coef"])
def test_state_of_tezo_is_that_of_naive_loops(method: str, corrected: bool) -> None:
    kind = method.removeprefix("tezo-")
    fields = {"bias_correction": corrected, **RULES, **FIELDS}
    records = list(run(method, W0, curved, STEPS, LR, RHO, queries=2, **fields))
    moved = changes(records, MATRIX)
    naive = naive_tezo(kind, records, corrected, True)
    assert all(close(*pair) for pair in zip(moved, naive, strict=True))
    kept = naive_tezo(kind, records, corrected, False)  # state that outlives its basis
    right = [close(*pair) for pair in zip(moved, kept, strict=True)]
    assert right == [True] * PERIOD + [False] * (STEPS - PERIOD)
    if kind == "adam":
        crossed = naive_tezo(kind, records, corrected, True, crossed=True)
        assert not any(close(*pair) for pair in zip(moved, crossed, strict=True))


def test_separable_second_moment_is_the_mean_square_over_signs() -> None:
    """The second moment is the mean over the signs of τ of (U diag(g) Vᵀ)², element by element: cross
    terms have mean zero."""
    record = next(run("tezo-adam", W0, curved, 1, LR, RHO, eps=0.0, **FIELDS))
    U, V = (f.double() for f in factors("linear", (5, 7), 2, SEED))
    g = record.kappas[0] * tau("linear", 2, SEED, 0, 0).double()
    Z = U @ torch.diag(g) @ V.T
    second = (LR * Z / changes([record], "linear")[0]) ** 2  # from Δ = -lr Z/√V
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2))).double()
    squares = torch.stack([(U @ torch.diag(s * g) @ V.T) ** 2 for s in signs])
    assert close(second, squares.mean(dim=0))
    assert not close(second, Z**2)


def naive_lozo_m(records: list[Record], project: bool) -> Iterator[Tensor]:
    """Yields Δ of MATRIX by a momentum that is a whole matrix, projected on each new V."""
    (m, n), r, b = (6, 4), RANKS[MATRIX], RULES["momentum"]
    N = torch.zeros(m, r, dtype=torch.float64)
    momentum = torch.zeros(m, n, dtype=torch.float64)
    for record in records:
        V = factors(MATRIX, SHAPES[MATRIX], r, SEED + record.step // PERIOD)[1].double()
        if project and record.step and record.step % PERIOD == 0:
            N = momentum @ V / n
        for i, s in itertools.product(range(m), range(r)):
            g = 0.0
            for q, kappa in enumerate(record.kappas):
                U = fresh_left(MATRIX, r, SEED, record.step, q, torch.arange(m))
                g += kappa * float(U[i, s]) / len(record.kappas)
            N[i, s] = b * N[i, s] + (1 - b) * g
        momentum = N @ V.T
        yield (-LR * momentum).view(SHAPES[MATRIX])


def test_momentum_of_lozo_is_projected_at_refreshes() -> None:
    records = list(run("lozo-m", W0, curved, STEPS, LR, RHO, queries=2, **RULES, **FIELDS))
    moved = changes(records, MATRIX)
    projected, kept = naive_lozo_m(records, True), naive_lozo_m(records, False)
    assert all(close(*pair) for pair in zip(moved, projected, strict=True))
    right = [close(*pair) for pair in zip(moved, kept, strict=True)]
    assert right == [True] * PERIOD + [False] * (STEPS - PERIOD)
