"""The generator of `rng` compiled for the CPU: the same bits, twenty times as fast.

numba compiles loops over short blocks of counters, one stage after the other, so that LLVM finds
vector instructions for each. Without `fastmath` it neither reorders nor fuses what IEEE rounds apart.
Importing this costs about two seconds for the compilation, every time: numba's cache on disk writes
its index before what the index points to, so processors of two kinds that share a folder may run
each other's code.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import float32, int64, njit, void
from torch import Tensor

from tezo_ds.rng.constants import ATANH, COS, MULTIPLIERS, ROUNDS, SIN, WEYL, Word

_BLOCK = 256  # counters at a time: what the stages hand on stays in the first-level cache
_PER_THREAD = 1 << 17  # numbers that repay the start of a thread

_M0, _M1 = map(np.uint64, MULTIPLIERS)
_W0, _W1 = map(np.uint32, WEYL)
_32 = np.uint64(32)
_LOW_16, _LOW_30, _16 = np.uint32(0xFFFF), np.uint32(0x3FFFFFFF), np.uint32(16)
_ROOT_HALF, _LOG_2, _QUARTER_TURN = math.sqrt(0.5), math.log(2), math.pi / 2

_SIGNATURE = void(
    float32[:, ::1], int64[:], int64[:], int64[:], int64[:], int64, int64, int64, int64
)
_compiled: Any = njit(nogil=True, error_model="numpy")
_compiled_now: Any = njit(_SIGNATURE, nogil=True, error_model="numpy")


def fill_(
    out: Tensor, index: Tensor, key: tuple[Word, Word], stream: Word, first_block: int
) -> None:
    """Writes the numbers of `rng.normals` or `rng.uniforms`, on `torch.get_num_threads()` threads.

    Args:
        out: float32 (n, blocks, 4) for normals or (n, blocks, 8) for uniforms, contiguous, on the CPU.
        index: int64 (n,).
        key, stream: ints, or int64 tensors (n,).
        first_block: the first counter of each row.
    """
    n = len(index)
    words = [torch.as_tensor(word, device="cpu").expand(n).numpy() for word in (*key, stream)]
    _, blocks, each = out.shape
    counters = n * blocks
    threads = max(1, min(torch.get_num_threads(), out.numel() // _PER_THREAD))
    cuts = [counters * i // threads for i in range(threads + 1)]
    numbers, rows = out.view(counters, each).numpy(), index.numpy()

    def fill(start: int, stop: int) -> None:
        _fill(numbers, rows, *words, first_block, blocks, start, stop)

    if threads == 1:
        fill(0, counters)
    else:
        # New threads each time: a pool that is kept would not survive a fork.
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, cuts[:-1], cuts[1:]))


@_compiled
def _philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> None:
    """Computes Philox in place on uint32 arrays. Rounds are the outer loop, as LLVM vectorises inner ones."""
    for r in range(ROUNDS):
        w0, w1 = np.uint32(r * _W0), np.uint32(r * _W1)
        for j in range(len(c0)):
            x0, x1, x2, x3 = c0[j], c1[j], c2[j], c3[j]
            p0, p1 = np.uint64(x0) * _M0, np.uint64(x2) * _M1
            c0[j] = np.uint32(p1 >> _32) ^ x1 ^ np.uint32(k0[j] + w0)
            c1[j] = np.uint32(p1)
            c2[j] = np.uint32(p0 >> _32) ^ x3 ^ np.uint32(k1[j] + w1)
            c3[j] = np.uint32(p0)


@_compiled
def _horner(c: Any, z: Any) -> Any:
    return ((((c[0] * z + c[1]) * z + c[2]) * z + c[3]) * z + c[4]) * z + c[5]


@_compiled
def _log(x: Any) -> Any:
    bits = np.float64(x).view(np.int64)
    exponent = np.float64((bits >> 52) - 1022)
    mantissa = np.int64(bits & 0xFFFFFFFFFFFFF | 0x3FE0000000000000).view(np.float64)
    small = mantissa < _ROOT_HALF
    mantissa = mantissa * 2 if small else mantissa
    exponent = exponent - 1 if small else exponent
    s = (mantissa - 1) / (mantissa + 1)
    z = s * s
    series = (_horner(ATANH, z) * z + ATANH[6]) * s
    return exponent * _LOG_2 + series * 2


@_compiled
def _box_muller(x: Any, y: Any, first: Any, second: Any) -> None:
    """Computes Box-Muller normals, float32 arrays, from uint32 arrays."""
    for j in range(len(x)):
        radius = math.sqrt(_log((np.float64(x[j]) + 0.5) * 2.0**-32) * -2)
        phi = (np.float64(y[j] & _LOW_30) * 2.0**-30 - 0.5) * _QUARTER_TURN
        z = phi * phi
        cos, sin = _horner(COS, z) * radius, _horner(SIN, z) * phi * radius
        quadrant = np.int64(y[j]) >> 30
        odd = (quadrant & 1) != 0
        a, b = (sin if odd else cos), (cos if odd else sin)
        first[j] = np.float32(-a if (quadrant == 1) | (quadrant == 2) else a)
        second[j] = np.float32(-b if quadrant >= 2 else b)


@_compiled_now
def _fill(
    out: Any, index: Any, key0: Any, key1: Any, stream: Any,
    first_block: int, blocks: int, start: int, stop: int,
) -> None:  # fmt: skip
    """Fills a row of `out`, 4 normals or 8 uniforms, for each counter [start, stop) of all rows · blocks."""
    words = np.empty((6, _BLOCK), np.uint32)  # counter and key; the first four become the result
    pairs = np.empty((4, _BLOCK), np.float32)
    row, block = start // blocks, start % blocks
    for at in range(start, stop, _BLOCK):
        n = min(_BLOCK, stop - at)
        for j in range(n):
            words[0, j] = first_block + block
            words[1, j] = index[row]
            words[2, j] = index[row] >> 32
            words[3, j] = stream[row]
            words[4, j] = key0[row]
            words[5, j] = key1[row]
            block += 1
            if block == blocks:
                row, block = row + 1, 0
        # Each row apart: numba would not know that a row of words[:, :n] is contiguous.
        c0, c1, c2, c3 = words[0, :n], words[1, :n], words[2, :n], words[3, :n]
        _philox(c0, c1, c2, c3, words[4, :n], words[5, :n])
        numbers = out[at : at + n]
        if out.shape[1] == 4:
            _box_muller(c0, c1, pairs[0, :n], pairs[1, :n])
            _box_muller(c2, c3, pairs[2, :n], pairs[3, :n])
            for j in range(n):
                for k in range(4):
                    numbers[j, k] = pairs[k, j]
        else:
            for j in range(n):
                for k in range(4):
                    numbers[j, 2 * k] = (words[k, j] & _LOW_16) * 2.0**-16
                    numbers[j, 2 * k + 1] = (words[k, j] >> _16) * 2.0**-16
