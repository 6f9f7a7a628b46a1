"""Counts of large singular values, held against LAPACK's, and matrices that are refused or left out."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import tezo_ds
from tezo_ds.auto import rank as auto_rank
from tezo_ds.auto.rank import auto_ranks
from tezo_ds.directions.space import Matrix
from tezo_ds.engine.live_bytes import LiveBytes
from tezo_ds.patterns import numbered_module
from tezo_ds.sharding import sharding_of
from tezo_ds.sharding.view import matrix_shape

N = 200
INDEX = torch.arange(N, dtype=torch.float64)


def matrix(spectrum: Tensor, rows: int, seed: int = 0) -> Tensor:
    """Makes a matrix (rows, len(spectrum)) with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    U, V = (
        torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64))[0]
        for m in (rows, n)
    )
    return (U * spectrum) @ V.T


def parts(*parts: tuple[float, int]) -> Tensor:
    """Makes a spectrum of N values from (value, count) pairs; the last pair fills what is left."""
    return torch.cat([torch.full((count,), float(value)) for value, count in parts]).double()


def of(weights: dict[str, Tensor], threshold: float = 0.25, cap: int = 64) -> dict[str, int]:
    """Runs `auto_ranks` on a module in this process that has these parameters."""
    module = nn.Module()
    for name, weight in weights.items():
        *path, last = name.split(".")
        parent = module
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.register_parameter(last, nn.Parameter(weight, requires_grad=False))
    named = [Matrix(name, matrix_shape(w.shape), 1) for name, w in weights.items()]
    return auto_ranks(sharding_of(module), named, threshold, cap, seed=3)


def expected(weight: Tensor, threshold: float, cap: int) -> int:
    values = torch.linalg.svdvals(weight.double())
    return min(cap, int((values >= threshold * values[0]).sum()))


SPECTRA = {
    "decaying": 0.97**INDEX,
    "decaying fast": 0.8**INDEX,
    "power": (1 + INDEX) ** -0.7,
    "flat": 1 - 0.001 * INDEX / N,
    "linear": 1 - INDEX / N,
    "step": torch.cat([torch.linspace(1, 0.5, 40), torch.full((N - 40,), 0.01)]).double(),
    "of low rank": torch.cat([torch.linspace(1, 0.3, 20), torch.zeros(N - 20)]).double(),
    "one above a crowd below": parts((1, 1), (0.2469, N - 1)),
    "one above a crowd above": parts((1, 1), (0.2531, N - 1)),
    "9 by a crowd": parts((1, 1), (0.2531, 9), (0.2469, N - 10)),
    "60 by a crowd": parts((1, 1), (0.2531, 59), (0.2469, N - 60)),
    "64 by a crowd": parts((1, 1), (0.2531, 63), (0.2469, N - 64)),
    "crowd at the top": torch.cat([torch.ones(1), torch.linspace(0.98, 0.2, N - 1)]).double(),
    "outlier over a bulk": torch.cat(
        [torch.tensor([30.0]), torch.linspace(9, 7.6, 36), torch.linspace(7.4, 1, N - 37)]
    ).double(),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_counts_are_those_of_lapack(name: str) -> None:
    for rows, cap in ((301, 64), (200, 7), (201, 150)):
        weight = matrix(SPECTRA[name], rows).float()
        count = expected(weight, 0.2525, cap)
        assert count == expected(weight, 0.2475, cap)  # nothing is within 1 % of the threshold
        for oriented in (weight, weight.t().contiguous()):
            assert of({"w": oriented}, 0.25, cap) == {"w": count}


@pytest.mark.parametrize("count", [1, 2, 30, 63, 64])
def test_any_threshold_is_kept(count: int) -> None:
    weight = matrix(SPECTRA["decaying"], 301).float()
    assert of({"w": weight}, 0.97 ** (count - 0.5)) == {"w": count}


def test_crowds_are_miscounted_where_doubts_are_not_heeded() -> None:
    weight = matrix(SPECTRA["60 by a crowd"], 301).float()
    assert of({"w": weight}) == {"w": 60}
    with mock.patch.object(auto_rank, "CAUTION", 0):
        assert of({"w": weight}) != {"w": 60}
    with mock.patch.object(auto_rank, "ROUNDS", 2):
        assert of({"w": weight}) != {"w": 60}


def test_filters_are_what_makes_it_quick() -> None:
    def passes() -> int:
        with mock.patch.object(auto_rank, "_products", wraps=auto_rank._products) as products:
            of({"w": matrix(SPECTRA["60 by a crowd"], 301).float()})
        return products.call_count

    with mock.patch.object(auto_rank, "DEGREES", 1), mock.patch.object(auto_rank, "ROUNDS", 300):
        plain = passes()
    assert passes() < 50 and plain > 2 * passes()


@pytest.mark.parametrize("shape", [(3, 5), (1, 9), (9, 1), (17, 17), (7, 4, 3)])
def test_small_matrices_are_exact(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    for threshold in (0.001, 0.3, 1.0):
        flat = weight.view(matrix_shape(shape))
        assert of({"w": weight}, threshold)["w"] == expected(flat, threshold, 64)
    assert of({"w": weight}, 0.001, cap=2)["w"] == min(2, *matrix_shape(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_is_read_piece_by_piece(dtype: torch.dtype) -> None:
    weight = matrix(SPECTRA["decaying"], 301).to(dtype)
    with mock.patch.object(auto_rank, "PIECE", 1000):
        assert of({"w": weight})["w"] == expected(weight, 0.25, 64) == 46


def test_sizes_of_numbers_do_not_matter() -> None:
    weight = matrix(SPECTRA["decaying"], 301).float()
    for scale in (1e-30, 1e30):
        assert of({"w": weight * scale}) == {"w": 46}


def test_zeros_count_as_one() -> None:
    weights = {"w": torch.zeros(90, 100), "v": matrix(SPECTRA["decaying"], 301).float()}
    assert of(weights) == {"w": 1, "v": 46}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    bad = torch.randn(90, 100)
    bad[89, 3] = value
    with pytest.raises(tezo_ds.ConfigError, match=r"h\.1\.w has weights that are not finite"):
        of({"h.0.w": torch.randn(90, 100), "h.1.w": bad})


def test_a_block_takes_the_least_of_its_matrices() -> None:
    counts = {
        "embed": 50, "h.0.q": 30, "h.0.mlp.experts.1.w": 12, "h.0.mlp.up": 40,
        "h.1.q": 33, "h.10.q": 21, "head.a": 9, "head.b": 14,
    }  # fmt: skip
    weights = {
        name: matrix(parts((1, count), (0.1, 90 - count)), 101, seed=count).float()
        for name, count in counts.items()
    }
    alone = {name: of({name: weight})[name] for name, weight in weights.items()}
    assert alone == counts
    blocks = {**counts, "h.0.q": 12, "h.0.mlp.up": 12}
    assert of(weights) == blocks
    with mock.patch.object(auto_rank, "TOGETHER", 1):  # so that a block is in several groups
        assert of(weights) == blocks
    assert of(weights, cap=20) == {name: min(count, 20) for name, count in blocks.items()}


def test_blocks_are_the_outermost_numbered_modules() -> None:
    assert numbered_module("model.layers.3.mlp.experts.12.w1.weight") == "model.layers.3"
    assert numbered_module("0.weight") == "0"
    assert numbered_module("lm_head.weight") is None
    assert numbered_module("stack.w2.weight") is None
    assert numbered_module("scales.3") is None  # a parameter, not a module


def test_memory_is_that_of_the_bases() -> None:
    weights = {f"h.{i}.w": torch.randn(700, 2000) for i in range(3)}
    basis = (700 + 2000) * (4 + auto_rank.OVERSAMPLING) * 8
    assert 4 * basis < weights["h.0.w"].nbytes
    module = nn.ParameterDict({k.replace(".", "_"): nn.Parameter(w) for k, w in weights.items()})
    named = [Matrix(name, (700, 2000), 1) for name in module]
    sharding = sharding_of(module)
    with mock.patch.object(auto_rank, "TOGETHER", 1), LiveBytes() as live:
        auto_ranks(sharding, named, 0.25, 4, seed=0)
    one = live.peak
    assert one < 4 * basis
    with LiveBytes() as live:
        auto_ranks(sharding, named, 0.25, 4, seed=0)
    assert live.peak > 1.5 * one
