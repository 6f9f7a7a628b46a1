"""U, V and τ by name; the coefficient vector; in-place updates of ragged shards."""

from __future__ import annotations

import pytest
import torch

import tezo_ds
from tezo_ds.directions.lowrank import FixedFactors, add_low_rank_
from tezo_ds.directions.space import CoefficientSpace, Matrix
from tezo_ds.sharding import ShardView
from tezo_ds.sharding.view import matrix_shape

NAME, SHAPE, RANK, SEED = "layers.3.weight", (37, 22), 5, 11


@pytest.mark.parametrize(
    "rows", [slice(4, 19), range(4, 19), list(range(4, 19)), torch.arange(4, 19)]
)
def test_rows_of_U_are_the_same_bits_as_of_the_whole(rows: object) -> None:
    U, V = tezo_ds.factors(NAME, SHAPE, RANK, SEED)
    part, same_V = tezo_ds.factors(NAME, SHAPE, RANK, SEED, rows=rows)
    assert U.shape == (37, RANK) and V.shape == (22, RANK) and U.dtype == V.dtype == torch.float32
    assert torch.equal(part, U[4:19]) and torch.equal(same_V, V)


def test_factors_differ_by_name_seed_and_side() -> None:
    U, V = tezo_ds.factors("a", (9, 9), 4, 0)
    assert not torch.equal(U, V)
    assert not torch.equal(U, tezo_ds.factors("b", (9, 9), 4, 0)[0])  # same-shaped layers
    assert not torch.equal(U, tezo_ds.factors("a", (9, 9), 4, 1)[0])
    with pytest.raises(IndexError, match=r"not all within \[0, 9\)"):
        tezo_ds.factors("a", (9, 9), 4, 0, rows=[9])
    with pytest.raises(ValueError, match="two dims"):
        tezo_ds.factors("bias", (9,), 4, 0)
    assert matrix_shape((2, 3, 5)) == (6, 5)


def test_tau_is_fresh_by_name_step_and_direction() -> None:
    taus = {
        (name, step, direction): tuple(tezo_ds.tau(name, RANK, SEED, step, direction).tolist())
        for name in "ab" for step in range(3) for direction in range(3)
    }  # fmt: skip
    assert len(set(taus.values())) == len(taus)
    again = tezo_ds.tau("a", RANK, SEED, 2, 1)
    assert again.dtype == torch.float32 and tuple(again.tolist()) == taus["a", 2, 1]


def test_all_taus_at_once_are_those_of_tau() -> None:
    matrices = [Matrix("a", (9, 8), 3), Matrix("b", (7, 9), 6), Matrix("c", (9, 9), 1)]
    space = CoefficientSpace(matrices, SEED)
    for step, directions in ((4, 3), (5, 3), (40, 3), (3, 3), (3, 1), (4, 2)):  # any order, any Q
        together = space.taus(step, range(directions))
        assert together.shape == (directions, 10) == (directions, space.numel)
        for direction in range(directions):
            for matrix in matrices:
                expected = tezo_ds.tau(matrix.name, matrix.rank, SEED, step, direction)
                assert torch.equal(space.split(together[direction])[matrix.name], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("start", "stop", "hazard"),
    [
        (0, 37 * 22, "whole"),
        (44, 66, "one whole row"),
        (30, 100, "ragged at both ends"),
        (30, 66, "ragged head"),
        (44, 100, "ragged tail"),
        (50, 60, "inside one row"),
        (40, 50, "two parts of rows and no whole one"),
        (70, 70, "empty"),
    ],
)
def test_updates_of_a_shard_are_those_of_the_matrix(
    dtype: torch.dtype, start: int, stop: int, hazard: str
) -> None:
    space = CoefficientSpace([Matrix(NAME, SHAPE, RANK, dtype)], SEED)
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(SHAPE, generator=generator).to(dtype)
    c = torch.randn(RANK, generator=generator, dtype=torch.float64)
    view = ShardView(NAME, SHAPE, start, W.flatten()[start:stop].clone())
    factors = FixedFactors(space)
    U, V = factors.left_of(view), factors.right_of(view)
    assert len(U) == len(view.rows) and U.dtype == dtype
    before, guard = view.local.clone(), view.local.clone()
    add_low_rank_(view, factors.scaled(view, c[None]), V)
    whole_U, whole_V = (f.to(dtype).double() for f in tezo_ds.factors(NAME, SHAPE, RANK, SEED))
    change = ((whole_U * c.float().double()) @ whole_V.t()).flatten()[start:stop]
    expected = (before.double() + change).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-5}[dtype]
    torch.testing.assert_close(view.local, expected, rtol=tolerance, atol=tolerance)
    assert stop == start or not torch.equal(view.local, guard)


@pytest.mark.parametrize("rows", [range(37), range(9, 20), range(4, 4)])
def test_updates_of_a_block_of_columns_are_those_of_the_matrix(rows: range) -> None:
    columns = range(5, 14)
    space = CoefficientSpace([Matrix(NAME, SHAPE, RANK)], SEED)
    c = torch.randn(RANK, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    local = torch.zeros(len(rows) * len(columns))
    view = ShardView(NAME, SHAPE, rows.start * len(columns), local, columns)
    factors = FixedFactors(space)
    factors.keep = True
    U, V = factors.left_of(view), factors.right_of(view)
    assert (len(U), len(V)) == (len(rows), len(columns)) and factors.left_of(view) is U
    add_low_rank_(view, factors.scaled(view, c[None]), V)
    whole_U, whole_V = tezo_ds.factors(NAME, SHAPE, RANK, SEED)
    change = (whole_U * c.float()) @ whole_V.t()
    block = change[rows.start : rows.stop, columns.start : columns.stop]
    torch.testing.assert_close(local.view(len(rows), len(columns)), block, rtol=1e-5, atol=1e-5)


def test_bfloat16_sums_are_rounded_once() -> None:
    """U diag(c) Vᵀ in bfloat16 would lose what the row-block path keeps."""
    space = CoefficientSpace([Matrix(NAME, SHAPE, RANK, torch.bfloat16)], SEED)
    W = torch.zeros(SHAPE, dtype=torch.bfloat16)
    view = ShardView(NAME, SHAPE, 0, W.view(-1))
    factors = FixedFactors(space)
    U, V = factors.left_of(view), factors.right_of(view)
    c = torch.full((RANK,), 1.001, dtype=torch.float64)  # 1.001 rounds to 1 in bfloat16
    add_low_rank_(view, factors.scaled(view, c[None]), V)
    exact = (U.double() * c) @ V.double().t()
    assert torch.equal(W, exact.to(torch.bfloat16))
