"""The problem of the oracles' tests, its draws, and what a run changed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tezo_ds.methods import reference
from tezo_ds.methods.reference import Record

SEED, STEPS, LR, RHO = 5, 7, 0.01, 0.25
SHAPES = {"conv": (3, 2, 4), "linear": (5, 7), "bias": (9,)}
RANKS = {"conv": 3, "linear": 2}
PERIOD = 3  # steps between refreshes
FIELDS: dict[str, Any] = {"seed": SEED, "rank": RANKS, "refresh_every": PERIOD, "nu": PERIOD}
RULES: dict[str, Any] = {"momentum": 0.8, "betas": (0.7, 0.9), "eps": 1e-3}
MATRIX, VECTOR = "conv", "bias"


def remembered(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Remembers what a function draws: methods share many draws, and one costs more than a small step's
    algebra."""
    known: dict[tuple[Any, ...], Any] = {}

    def recall(*args: Any) -> Any:
        key = tuple(tuple(a.tolist()) if isinstance(a, Tensor) else a for a in args)
        if key not in known:
            known[key] = draw(*args)
        return known[key]

    return recall


factors, tau = remembered(reference.factors), remembered(reference.tau)
fresh_left, dense = remembered(reference.fresh_left), remembered(reference.dense)
DRAWS = {"factors": factors, "tau": tau, "fresh_left": fresh_left, "dense": dense}


@pytest.fixture
def quick_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the oracles draw the same numbers once."""
    for name, draw in DRAWS.items():
        monkeypatch.setattr(reference, name, draw)


def normal(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


G, W0 = normal(0), normal(1)


def linear(step: int, weights: dict[str, Tensor]) -> float:
    return sum(float((G[name] * w).sum()) for name, w in weights.items())


def curved(step: int, weights: dict[str, Tensor]) -> float:
    return sum(float((G[name] * w + step + w.square()).cos().sum()) for name, w in weights.items())


def draws(family: str, name: str, step: int, q: int) -> Tensor:
    """Forms Z of one direction by sums over r, in the parameter's shape."""
    shape = SHAPES[name]
    if len(shape) == 1:
        return tau(name, shape[0], SEED, step, q).double()
    m, n = math.prod(shape[:-1]), shape[-1]
    if family == "mezo":
        return dense(name, SEED, step, q, torch.arange(m), range(n)).double().view(shape)
    r = RANKS[name]
    U, V = factors(name, shape, r, SEED + step // PERIOD)
    c = tau(name, r, SEED, step, q)
    if family == "lozo":
        U, c = fresh_left(name, r, SEED, step, q, torch.arange(m)), torch.ones(r)
    U, V, c = U.double(), V.double(), c.double()
    return sum(c[s] * torch.outer(U[:, s], V[:, s]) for s in range(r)).view(shape)


def changes(records: list[Record], name: str) -> list[Tensor]:
    """Returns Δ of each step, in the parameter's shape."""
    path = [W0[name], *(record.weights[name] for record in records)]
    return [after - before for before, after in itertools.pairwise(path)]


def gradients(records: list[Record], family: str, name: str) -> list[Tensor]:
    """Returns the mean over directions of κZ, for each step."""
    return [
        sum(k * draws(family, name, record.step, q) for q, k in enumerate(record.kappas))
        / len(record.kappas)
        for record in records
    ]


def close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, rtol=1e-9, atol=1e-12)
