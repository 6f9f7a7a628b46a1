"""Counter-based numbers: a pure function of (seed, name, purpose, index), the same bits on any device.

Philox-4x32-10 (Salmon et al., SC'11) as int64 tensor operations, then Box-Muller. The logarithm, sine
and cosine are polynomials built from IEEE +, -, *, /, sqrt in float64: libm, MKL and CUDA disagree in
the last bit of theirs, and replicas on different processors must not.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time

import torch
from torch import Tensor

from tezo_ds.rng.constants import ATANH, COS, MULTIPLIERS, ROUNDS, SIN, WEYL, Word

_MASK = 0xFFFFFFFF
_CHUNK = 1 << 16  # counters at a time: keeps a dozen int64 temporaries within cache
_COMPILE = 1 << 18  # numbers of one request that repay the compilation
_COMPILATION = 2.0  # seconds that it takes, about
_spent = 0.0  # seconds of this process in small requests, without it


def derive_key(seed: int, name: str, purpose: str) -> tuple[int, int]:
    """Returns two 32-bit Philox key words of a named stream, e.g. ("model.layers.0.q_proj.weight", "U")."""
    digest = hashlib.blake2b(f"{seed}\0{purpose}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Tensor, ...]:
    """Returns four 32-bit words of Philox-4x32-10 for each counter.

    Args:
        counter: four words in [0, 2**32), ints or int64 tensors that broadcast, at least one a tensor.
        key: two words in [0, 2**32), ints or int64 tensors that broadcast.

    Returns:
        Four int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2**64: the low 64 bits, hence both halves, are right.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & _MASK, (k1 + WEYL[1]) & _MASK
    return tuple(torch.broadcast_tensors(*map(torch.as_tensor, (c0, c1, c2, c3))))


def _horner(coefficients: tuple[float, ...], z: Tensor) -> Tensor:
    total = torch.full_like(z, coefficients[0])
    for coefficient in coefficients[1:]:
        total.mul_(z).add_(coefficient)
    return total


def _log(x: Tensor) -> Tensor:
    """Returns ln x of positive float64, by ln m = 2 artanh((m-1)/(m+1)) with m in [√½, √2)."""
    mantissa, exponent = torch.frexp(x)
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa * 2, mantissa)
    exponent = exponent.to(torch.float64) - small.to(torch.float64)
    s = (mantissa - 1) / (mantissa + 1)
    series = _horner(ATANH, s * s) * s
    return exponent * math.log(2) + series * 2


def box_muller(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two float32 standard normals from two 32-bit words (int64 tensors).

    Radius √(-2 ln((x+½)/2³²)); angle 2πy/2³² - π/4, so that each quadrant centres on an axis and the
    sine and cosine polynomials see only [-π/4, π/4).
    """
    radius = torch.sqrt(_log((x.to(torch.float64) + 0.5) * 2.0**-32) * -2)
    phi = ((y & 0x3FFFFFFF).to(torch.float64) * 2.0**-30 - 0.5) * (math.pi / 2)
    z = phi * phi
    cos, sin = _horner(COS, z) * radius, _horner(SIN, z) * phi * radius
    quadrant = y >> 30
    odd = (quadrant & 1).bool()
    first = torch.where(odd, sin, cos)
    second = torch.where(odd, cos, sin)
    first = torch.where((quadrant == 1) | (quadrant == 2), -first, first)
    second = torch.where(quadrant >= 2, -second, second)
    return first.to(torch.float32), second.to(torch.float32)


def normals(
    key: tuple[Word, Word], index: Tensor, width: int, stream: Word = 0, first: int = 0
) -> Tensor:
    """Returns N(0, 1) numbers addressed by (key, index, column, stream).

    Args:
        key: from `derive_key`; ints, or int64 tensors of shape (n,), one key for each index.
        index: int64 (n,), e.g. row numbers; the same row gives the same numbers in any company.
        width: numbers for each index; a narrower request is a prefix of a wider one.
        stream: a further 32-bit counter word, e.g. the step; an int, or one for each index: (n,).
        first: column to begin with.

    Returns:
        float32 (n, width) on `index`'s device.
    """
    return _addressed(4, key, index, width, stream, first)


def uniforms(
    key: tuple[Word, Word], index: Tensor, width: int, stream: Word = 0, first: int = 0
) -> Tensor:
    """Returns numbers k/65536 of 16 random bits k, hence in [0, 1), addressed as `normals` are.

    Returns:
        float32 (n, width) on `index`'s device.
    """
    return _addressed(8, key, index, width, stream, first)


def gumbels(key: tuple[Word, Word], index: Tensor, width: int, stream: Word = 0) -> Tensor:
    """Returns Gumbel(0, 1) numbers, -ln(-ln u) of 32 random bits u, addressed as `normals` are.

    Returns:
        float32 (n, width) on `index`'s device.
    """
    blocks = torch.arange(-(-width // 4), device=index.device)
    out = torch.empty(len(index), len(blocks), 4, dtype=torch.float32, device=index.device)
    for row, i in enumerate(index):
        words = philox((blocks, i & _MASK, (i >> 32) & _MASK, stream & _MASK), key)
        u = (torch.stack(words, dim=-1).to(torch.float64) + 0.5) * 2.0**-32
        out[row] = -_log(-_log(u))
    return out.flatten(1)[:, :width]


def _addressed(
    each: int, key: tuple[Word, Word], index: Tensor, width: int, stream: Word, first: int
) -> Tensor:
    """Returns columns first ... first+width; a counter gives `each`, 4 normals or 8 uniforms."""
    global _spent
    skip = first % each
    blocks = -(-(skip + width) // each)
    out = torch.empty(len(index), blocks, each, dtype=torch.float32, device=index.device)
    # Compiling takes seconds: who has spent as many is likely to go on, and wastes no more than these.
    # Once it is done, even a few numbers come sooner.
    pays = out.numel() >= _COMPILE or _spent >= _COMPILATION
    if index.is_cpu and (pays or "tezo_ds.rng.compiled" in sys.modules):
        from tezo_ds.rng import compiled

        compiled.fill_(out, index, key, stream, first // each)
    else:
        start = time.perf_counter()
        fill_(out, index, key, stream, first // each)
        _spent += time.perf_counter() - start
    return out.flatten(1)[:, skip : skip + width]


def fill_(
    out: Tensor, index: Tensor, key: tuple[Word, Word], stream: Word, first_block: int
) -> None:
    """Writes normals into `out` (n, blocks, 4), or uniforms into (n, blocks, 8), float32.

    The definition, on any device; `compiled.fill_` gives the same bits faster.
    """
    rows, blocks, each = out.shape
    block = first_block + torch.arange(blocks, device=index.device)  # (blocks,)
    rows_at_once = max(1, _CHUNK // max(1, blocks))
    for start in range(0, rows, rows_at_once):
        part = slice(start, start + rows_at_once)
        i = index[part, None]  # (rows, 1)
        k0, k1, s = (k[part, None] if isinstance(k, Tensor) else k for k in (*key, stream))
        words = philox((block, i & _MASK, (i >> 32) & _MASK, s & _MASK), (k0, k1))
        numbers = _normals_of(words) if each == 4 else _uniforms_of(words)
        out[part] = torch.stack(numbers, dim=-1)  # each x (rows, blocks)


def _normals_of(words: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return *box_muller(words[0], words[1]), *box_muller(words[2], words[3])


def _uniforms_of(words: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    halves = (half for word in words for half in (word & 0xFFFF, word >> 16))
    return tuple(half.to(torch.float32) * 2.0**-16 for half in halves)
