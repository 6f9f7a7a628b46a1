"""Stochastic rounding: what it must not touch, its mean, and the same bits however a matrix is cut."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tezo_ds.directions.rounding import round_, store_
from tezo_ds.rng.philox import derive_key
from tezo_ds.sharding.view import Piece, ShardView

KINDS = [torch.bfloat16, torch.float16]
ALL_U = torch.arange(65536) / 65536  # every number that `uniforms` gives
KEY = derive_key(0, "w", "rounding")

kinds = pytest.mark.parametrize("dtype", KINDS)


@kinds
def test_representable_numbers_stay_themselves(dtype: torch.dtype) -> None:
    """Every bit pattern stays itself, subnormal, infinite, -0 and NaN among them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for u in (0.0, 0.5, 65535 / 65536):
        for wide in (torch.float32, torch.float64):
            found = round_(every.to(wide), dtype, torch.full(every.shape, u))
            assert torch.equal(found.isnan(), every.isnan())
            bits = [z[~every.isnan()].view(torch.int16) for z in (found, every)]
            assert torch.equal(*bits)


def test_float32_would_round_up_what_is_representable() -> None:
    """Hazard: x/ulp + u formed in float32 rounds up numbers that need no rounding; float64 does not."""
    x = torch.tensor([1024 + 1.0], dtype=torch.float16)
    assert (x.float() + 65535 / 65536).floor() == 1026
    assert round_(x.float(), torch.float16, torch.tensor([65535 / 65536])) == 1025


@kinds
@pytest.mark.parametrize("place", ["normal", "subnormal", "between the two"])
def test_mean_over_all_uniforms_is_exact(dtype: torch.dtype, place: str) -> None:
    limits = torch.finfo(dtype)
    smallest = limits.tiny * limits.eps
    generator = torch.Generator().manual_seed(0)
    k = (
        torch.randint(1, 65536, (12,), generator=generator).double() / 65536
    )  # of an ulp, to be lost
    if place == "normal":
        exponent = torch.arange(12).double() - 6
        mantissa = torch.randint(0, round(1 / limits.eps), (12,), generator=generator) * limits.eps
        x = (1 + mantissa + k * limits.eps) * 2.0**exponent
    elif place == "subnormal":
        x = (torch.randint(0, round(1 / limits.eps) - 1, (12,), generator=generator) + k) * smallest
    else:
        x = limits.tiny - k * smallest
    x[::2] *= -1
    rounded = round_(x[:, None].expand(-1, 65536), dtype, ALL_U.expand(12, -1)).double()
    assert torch.equal(rounded.mean(1), x)
    below, above = rounded.amin(1), rounded.amax(1)
    assert ((below < x) & (x < above)).all()
    either = (rounded == below[:, None]) | (rounded == above[:, None])
    assert either.all()
    assert torch.equal(torch.nextafter(below.to(dtype), above.to(dtype)).double(), above)
    if place != "normal":  # what float32 holds of them is rounded alike
        single = round_(x.float()[:, None].expand(-1, 65536), dtype, ALL_U.expand(12, -1)).double()
        assert torch.equal(single.mean(1), x.float().double())


@kinds
def test_ends_are_those_of_a_conversion(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    last = limits.max * limits.eps / 4  # less than half of the last place there
    x = torch.tensor([limits.max, limits.max + last, limits.max * 1.01, 1e39, torch.inf, torch.nan])
    x = torch.cat([x, -x])
    for wide in (torch.float32, torch.float64):
        for u in (0.0, 65535 / 65536):
            found = round_(x.to(wide), dtype, torch.full(x.shape, u))
            torch.testing.assert_close(found, x.to(wide).to(dtype), rtol=0, atol=0, equal_nan=True)


def piece_of(weight: Tensor) -> Piece:
    return Piece("w", range(weight.shape[0]), range(weight.shape[1]), weight)


@kinds
def test_small_updates_arrive_on_average_and_by_rounding_to_nearest_never(
    dtype: torch.dtype,
) -> None:
    steps, ulp = 200, torch.finfo(dtype).eps
    for start in (1.25, -1.75):
        nearest, ours = torch.full((2, 61, 67), start, dtype=dtype)
        for step in range(steps):
            store_(piece_of(nearest), nearest.float() + 0.1 * ulp, None, step)
            store_(piece_of(ours), ours.float() + 0.1 * ulp, KEY, step)
        moved = (ours.double() - start) / ulp
        assert (nearest == start).all()
        error = (steps * 0.1 * 0.9 / ours.numel()) ** 0.5  # of the mean: each step is a coin of 0.1
        assert abs(moved.mean() - steps * 0.1) < 4.5 * error
        assert moved.std() < 1.1 * (steps * 0.1 * 0.9) ** 0.5  # so steps are independent


SHAPE = (37, 53)


def stored(values: Tensor, cuts: list[int], columns: range, numel: int, step: int) -> Tensor:
    """Writes some columns of a matrix shard by shard and piece by piece."""
    weight = torch.zeros(SHAPE[0], len(columns), dtype=torch.bfloat16)
    flat = weight.view(-1)
    for start, stop in itertools.pairwise(cuts):
        view = ShardView("w", SHAPE, start, flat[start:stop], columns)
        for piece in view.pieces(numel):
            new = values[
                piece.rows.start : piece.rows.stop, piece.columns.start : piece.columns.stop
            ]
            store_(piece, new, KEY, step)
    return weight


def test_same_bits_however_a_matrix_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    m, n = SHAPE
    whole = stored(values, [0, m * n], range(n), m * n, 7)
    assert not torch.equal(whole, values.bfloat16())  # to nearest
    assert not torch.equal(whole, stored(values, [0, m * n], range(n), m * n, 8))
    ragged = [0, 654, 655, 655, 1308, m * n]
    for numel in (1, 60, 500):
        assert torch.equal(stored(values, ragged, range(n), numel, 7), whole)
        for columns in (range(0, 27), range(27, n)):  # as tensor parallelism splits
            part = stored(values, [0, 100, m * len(columns)], columns, numel, 7)
            assert torch.equal(part, whole[:, columns.start : columns.stop])
    monkeypatch.setattr("tezo_ds.directions.rounding._CHUNK", 100)
    assert torch.equal(stored(values, [0, m * n], range(n), m * n, 7), whole)


def test_uniforms_that_are_drawn_in_order_would_depend_on_the_cut() -> None:
    """Hazard: two ranks that draw from generators of the same seed each would round otherwise than one
    process."""
    x, halves = torch.full((4, 100), 1.001), []
    whole = round_(
        x, torch.bfloat16, torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    )
    for part in x.split(2):
        u = torch.rand(part.shape, generator=torch.Generator().manual_seed(0))
        halves.append(round_(part, torch.bfloat16, u))
    assert not torch.equal(torch.cat(halves), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_shards_are_written_as_they_are(dtype: torch.dtype) -> None:
    values = torch.randn(SHAPE, dtype=torch.float64)
    weight = torch.zeros(SHAPE, dtype=dtype)
    store_(piece_of(weight), values, KEY, 3)
    assert torch.equal(weight, values.to(dtype))
