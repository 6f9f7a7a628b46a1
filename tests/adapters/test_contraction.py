"""Tensor trains: modes of any size, contraction against the oracle, published numbers of parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tezo_ds import ConfigError, TezoConfig
from tezo_ds.adapters.contraction import halves, one_by_one
from tezo_ds.adapters.modes import UNEVEN, balanced, divided
from tezo_ds.adapters.tt import TensorTrainAdapter
from tezo_ds.methods.reference_adapters import weight_of

BRANCHES, ROWS, RANK = 3, 4, 3
SIZES = (1, 2, 3, 13, 22, 31, 64, 576, 577, 768, 2048, 4096, 5120, 6656, 8191, 50021)


def made(size: int, **fields: Any) -> TensorTrainAdapter:
    return TensorTrainAdapter.of(TezoConfig(adapter="tt", **fields), size)


@pytest.mark.parametrize("size", SIZES)
def test_any_size_has_modes_near_each_other(size: int) -> None:
    modes = balanced(size)
    assert size <= math.prod(modes) < 1.25 * size + 1
    assert max(modes) <= UNEVEN * math.ceil(size ** (1 / len(modes)))
    assert max(modes) <= 1.5 * 32 and len(modes) >= 1 + (size >= 4) + (size > 32)


def test_sizes_of_real_models_are_not_padded() -> None:
    exact = {576: (8, 8, 9), 4096: (16, 16, 16), 5120: (16, 16, 20), 6656: (16, 16, 26)}
    assert {size: balanced(size) for size in exact} == exact
    assert math.prod(balanced(2048)) == 2048 and balanced(64) == (4, 4, 4)


def test_modes_as_users_give_them() -> None:
    assert divided((16, 16, 16, 4, 4, 4), 4096, 64) == ((16, 16, 16), (4, 4, 4))
    assert divided((8,) * 6, 768, 64) == ((8,) * 4, (8, 8))  # padded
    for modes in ((16, 16, 4, 4), (4096,), (16, 16, 16, 4, 4), (16, 16, 16, 4, 4, 4, 2)):
        with pytest.raises(
            ConfigError, match=r"tt_modes: .* use e.g. 16, 16, 16, 4, 4, 4"
        ) as caught:
            divided(modes, 4096, 64)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "modes", [((3, 4), (2, 3)), ((2, 3, 2), (5,)), ((2, 3, 2, 2, 3), (7, 2, 2, 3))]
)
def test_both_contractions_are_the_oracles(modes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Padded, as products of modes are above the sizes; chains of two to nine cores, even and odd."""
    size = math.prod(modes[0]) - 1, math.prod(modes[1]) - 1
    chain, cut = [*modes[0], *modes[1]], len(modes[0])
    ranks = [1, *[RANK] * (len(chain) - 1), 1]
    torch.manual_seed(0)
    cores = [
        torch.randn(BRANCHES, ranks[k], mode, ranks[k + 1], dtype=torch.float64)
        for k, mode in enumerate(chain)
    ]
    x = torch.randn(BRANCHES, ROWS, size[0], dtype=torch.float64)
    left, right = halves(cores, cut, size)
    assert left.shape == (BRANCHES, size[0], RANK) and right.shape == (BRANCHES, RANK, size[1])
    one_after_the_other = one_by_one(x, cores, cut, size[1])
    for b in range(BRANCHES):
        W = weight_of([core[b] for core in cores], cut, size)
        i, j = size[0] - 1, size[1] - 1  # one entry by the definition itself
        entry = torch.eye(1, dtype=torch.float64)
        for core, index in zip(
            cores,
            (
                *torch.unravel_index(torch.tensor(i), modes[0]),
                *torch.unravel_index(torch.tensor(j), modes[1]),
            ),
            strict=True,
        ):
            entry = entry @ core[b][:, index]
        torch.testing.assert_close(W[i, j], entry[0, 0])
        torch.testing.assert_close(left[b] @ right[b], W)
        torch.testing.assert_close(one_after_the_other[b], x[b] @ W)


def test_published_numbers_of_parameters() -> None:
    llama = made(4096, tt_modes=(16, 16, 16, 4, 4, 4))
    cores = sum(math.prod(s) for name, s in llama.shapes.items() if "bias" not in name)
    assert (96 * llama.numel, 96 * cores) == (610_560, 211_200)  # three adapters in 32 blocks
    assert llama.modes == made(4096).modes  # which we choose, too
    roberta = made(1024, tt_modes=(8, 8, 16, 8, 8))
    assert 48 * roberta.numel == 136_704  # two adapters in 24 blocks
    # The paper's 1.2 K for 768 and 64 counts the cores at both ends as if they had two ranks.
    shapes = made(768, tt_modes=(8,) * 6).shapes
    of_down = [shapes[f"down.{k}"] for k in range(6)]
    assert sum(5 * mode * 5 for _, mode, _ in of_down) == 1200
    assert sum(math.prod(shape) for shape in of_down) == 880


def test_initial_values() -> None:
    """Entries of W have the published deviation, and only the zero start leaves the model as it is."""
    zero, published = made(4096), made(4096, tt_init="published")
    for adapter in (zero, published):
        entries = []
        for seed in range(6):
            parts = adapter.split(adapter.initial("here", seed))
            assert not parts["down.bias"].any() and not parts["up.bias"].any()
            assert bool(parts["up.5"].any()) == (adapter is published)
            entries.append(weight_of([parts[f"down.{k}"] for k in range(6)], 3, (4096, 64)))
        deviation = torch.stack(entries).square().mean().sqrt().item()
        assert 0.7 < deviation * math.sqrt(4096 + 64) < 1.4
    again, other = (zero.initial(name, 3) for name in ("here", "there"))
    assert torch.equal(again, zero.initial("here", 3)) and not torch.equal(again, other)


def test_a_bottleneck_above_the_size() -> None:
    with pytest.raises(ConfigError, match=r"bottleneck: 64 is above the size 22 .* use at most 22"):
        made(22)
