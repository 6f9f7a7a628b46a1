"""Philox against the published vectors; Box-Muller against NumPy; the statistics of the normals and
uniforms; the compiled generator against the definition, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from unittest import mock

import numba
import numpy as np
import pytest
import torch

from tezo_ds.rng import compiled
from tezo_ds.rng import philox as generator
from tezo_ds.rng.philox import box_muller, derive_key, normals, philox, uniforms

# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_known_answers(counter: str, key: str, result: str) -> None:
    c0, *rest = words(counter)
    found = philox((torch.tensor([c0]), *rest), tuple(words(key)))
    assert [int(word) for word in found] == words(result)
    tensors = tuple(torch.tensor([word]) for word in words(counter))
    keys = tuple(torch.tensor([word]) for word in words(key))
    assert [int(word) for word in philox(tensors, keys)] == words(result)


def test_box_muller_is_the_textbook_formula() -> None:
    edges = torch.tensor([0, 1, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 3 * 2**30, 2**32 - 1])
    x, y = (grid.reshape(-1) for grid in torch.meshgrid(edges, edges, indexing="ij"))
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([x, torch.randint(0, 2**32, (100_000,), generator=generator)])
    y = torch.cat([y, torch.randint(0, 2**32, (100_000,), generator=generator)])
    first, second = box_muller(x, y)
    radius = np.sqrt(-2 * np.log((x.numpy() + 0.5) / 2**32))
    angle = 2 * np.pi * y.numpy() / 2**32 - np.pi / 4
    np.testing.assert_allclose(first, radius * np.cos(angle), rtol=1e-6, atol=2e-9)
    np.testing.assert_allclose(second, radius * np.sin(angle), rtol=1e-6, atol=2e-9)
    assert first.dtype == torch.float32 and first.abs().max() < 6.8


def test_moments() -> None:
    z = normals(derive_key(0, "w", "U"), torch.arange(250_000), 8).double().flatten()
    n = z.numel()  # standard errors: 1/√n, √(2/n), √(96/n)
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / n) ** 0.5
    below = torch.tensor([(z < q).double().mean() for q in (-2.0, -1.0, 0.0, 1.0, 2.0)])
    expected = torch.special.ndtr(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64))
    assert (below - expected).abs().max() < 4 * 0.5 / n**0.5


def test_streams_are_independent() -> None:
    rows, width = 20_000, 8
    streams = [
        normals(derive_key(seed, name, purpose), torch.arange(rows), width, stream).double()
        for seed, name, purpose, stream in [
            (0, "layers.0.q", "U", 0), (0, "layers.1.q", "U", 0), (0, "layers.0.q", "V", 0),
            (1, "layers.0.q", "U", 0), (0, "layers.0.q", "U", 1),
        ]
    ]  # fmt: skip
    flat = torch.stack([z.flatten() for z in streams])  # (streams, rows * width)
    correlation = torch.corrcoef(flat) - torch.eye(len(streams))
    assert correlation.abs().max() < 4.5 / (rows * width) ** 0.5
    columns = torch.corrcoef(streams[0].t()) - torch.eye(width)
    assert columns.abs().max() < 4.5 / rows**0.5
    neighbours = torch.corrcoef(torch.stack([streams[0][1:, 0], streams[0][:-1, 0]]))[0, 1]
    assert abs(neighbours) < 4.5 / rows**0.5


def test_same_row_same_bits_in_any_company() -> None:
    key = derive_key(3, "w", "U")
    whole = normals(key, torch.arange(1000), 13)
    assert torch.equal(normals(key, torch.tensor([999, 0, 17]), 13), whole[[999, 0, 17]])
    assert torch.equal(normals(key, torch.arange(1000), 6), whole[:, :6])
    big = torch.tensor([2**33 + 5])
    assert not torch.equal(normals(key, big, 4), normals(key, torch.tensor([5]), 4))


def test_same_bits_whatever_the_alignment_and_threads() -> None:
    """Bits do not depend on alignment or threads, though vectorised loops treat the last few elements
    apart and threads cut elsewhere."""
    key, index = derive_key(0, "w", "U"), torch.arange(40_000)
    whole = normals(key, index, 4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(normals(key, index, 4), whole)
    finally:
        torch.set_num_threads(threads)
    for start in (1, 3, 7):
        assert torch.equal(normals(key, index[start : start + 101], 4), whole[start : start + 101])


def test_golden_bits() -> None:
    """The random numbers of a user who upgrades must not change."""
    z = normals(derive_key(7, "model.layers.0.mlp.up_proj.weight", "U"), torch.tensor([0, 5]), 4)
    assert derive_key(0, "a", "U") == GOLDEN_KEY
    assert z.view(torch.int32).tolist() == GOLDEN


def test_uniforms_are_the_halves_of_the_words() -> None:
    key, index = derive_key(5, "w", "rounding"), torch.tensor([3, 2**33 + 1])
    u = uniforms(key, index, 40, stream=9)
    words = philox(
        (torch.arange(5), index[:, None] & 0xFFFFFFFF, index[:, None] >> 32, 9), key
    )  # 4 x (2, 5)
    k = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    assert torch.equal(u * 65536, k.flatten(1).float())
    for first in (1, 7, 8, 19):
        assert torch.equal(uniforms(key, index, 11, 9, first), u[:, first : first + 11])
    assert (u * 65536).int().tolist()[0][:4] == GOLDEN_UNIFORMS


def test_uniforms_are_uniform() -> None:
    u = uniforms(derive_key(0, "w", "rounding"), torch.arange(60_000), 16, stream=3)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 256, 0, 1)
    expected = u.numel() / 256
    chi = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi - 255) < 4.5 * (2 * 255) ** 0.5
    columns = torch.corrcoef(u.double().t()) - torch.eye(16)  # the halves of a word among them
    assert columns.abs().max() < 4.5 / len(u) ** 0.5


Request = tuple[torch.Tensor, tuple[generator.Word, generator.Word], generator.Word, int]


def requests(rows: int) -> dict[str, Request]:
    """Returns requests of numbers: indices, key, stream and first block."""
    index = torch.arange(rows)
    words = torch.randint(0, 2**32, (3, rows), generator=torch.Generator().manual_seed(0))
    return {
        "ints": (index, (0xFFFFFFFF, 0), 0xFFFFFFFF, 0),
        "a key and a stream for each": (index, (words[0], words[1]), words[2], 0),
        "strided, beyond 32 bits": ((torch.arange(2 * rows) << 29).flip(0)[::2], (1, 2), 3, 5),
        "none": (index[:0], (1, 2), 3, 0),
    }


@pytest.mark.parametrize("each", [4, 8])
@pytest.mark.parametrize(("rows", "blocks"), [(3001, 1), (1009, 97), (501, 300)])
def test_compiled_gives_the_same_bits(rows: int, blocks: int, each: int) -> None:
    """The compiled generator gives the same bits, though blocks of 256 counters begin and end inside rows,
    and hold several rows."""
    for name, (index, *address) in requests(rows).items():
        defined = torch.empty(len(index), blocks, each)
        found = torch.empty_like(defined)
        generator.fill_(defined, index, *address)
        compiled.fill_(found, index, *address)
        assert torch.equal(defined, found), name


def test_compiled_box_muller_at_extreme_words() -> None:
    """Box-Muller is right at the ends of the words, of the quadrants, and of the logarithm's reduction to
    [√½, √2)."""
    cuts = [round(2**32 * 2.0 ** (-k / 2)) for k in range(64)]
    edges = [0, 2**32 - 1] + [
        cut + d
        for cut in [*cuts, 2**30, 2**31, 3 * 2**30]
        for d in (-1, 0, 1)
        if 0 <= cut + d < 2**32
    ]
    x, y = torch.cartesian_prod(torch.tensor(edges), torch.tensor(edges)).t()
    first, second = np.empty((2, len(x)), np.float32)
    compiled._box_muller(x.numpy().astype(np.uint32), y.numpy().astype(np.uint32), first, second)
    for found, expected in zip((first, second), box_muller(x, y), strict=True):
        assert torch.equal(torch.from_numpy(found).view(torch.int32), expected.view(torch.int32))


def test_compiled_logarithm_is_not_fused() -> None:
    """Hazard: multiply-and-add in one rounding, which `fastmath` allows, changes the last bits of float64,
    and so about one normal in a thousand million."""

    def logs(function: Callable[[float], float], x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(numba.vectorize(["float64(float64)"])(function)(x.numpy()))

    x = (torch.arange(200_000, dtype=torch.float64) * 21_474.7 + 0.5) * 2.0**-32
    assert torch.equal(logs(lambda v: compiled._log(v), x), generator._log(x))
    fused = numba.njit(fastmath={"contract"}, error_model="numpy")(compiled._log.py_func)
    assert not torch.equal(logs(lambda v: fused(v), x), generator._log(x))


def test_same_bits_on_any_number_of_threads() -> None:
    key, index, threads = derive_key(1, "w", "Z"), torch.arange(611), torch.get_num_threads()
    drawn = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            drawn.append(normals(key, index, 1021, 4, first=3))
    finally:
        torch.set_num_threads(threads)
    assert drawn[0].numel() > 4 * compiled._PER_THREAD  # so that threads are started
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


@pytest.mark.slow
def test_compiles_at_once_for_a_large_request_alone() -> None:
    code = """if True:
        import sys, torch, tezo_ds
        from tezo_ds.rng.philox import normals
        normals((1, 2), torch.arange(100), 100)
        assert "numba" not in sys.modules
        whole = normals((1, 2), torch.arange(600), 600)
        assert "numba" in sys.modules
        assert torch.equal(normals((1, 2), torch.arange(7), 600), whole[:7])
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_compiles_once_small_requests_have_taken_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tezo_ds.rng.compiled")
    monkeypatch.setattr(generator, "_spent", 0.0)
    with mock.patch.object(compiled, "fill_", side_effect=compiled.fill_) as made:
        first = normals((1, 2), torch.arange(100), 100)
        assert made.call_count == 0 and generator._spent > 0
        monkeypatch.setattr(generator, "_COMPILATION", generator._spent)
        assert torch.equal(normals((1, 2), torch.arange(100), 100), first)
    assert made.call_count == 1


GOLDEN_KEY = (1122098354, 2837173087)
GOLDEN = [
    [-1084844749, -1078893312, 1055856502, -1086675178],
    [1059578327, -1081849782, -1095124930, -1097868890],
]
GOLDEN_UNIFORMS = [39576, 9892, 42517, 31496]
