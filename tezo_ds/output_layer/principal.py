"""Leading principal directions of states over all ranks, whose every bit is the same on any processor.

Ranks add up d · r numbers a round of orthogonal iteration, and not the d² of second moments.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tezo_ds.output_layer.newton import by_halves
from tezo_ds.rng.philox import philox

ROUNDS = 10
NOTHING = 1e-10  # of a direction's length that others leave of it: there is no other direction


def principal(moments: Callable[[Tensor], Tensor], width: int, rank: int) -> Tensor:
    """Returns orthonormal directions along which states vary most: float64 (rank, width), or fewer where
    they vary along fewer.

    Args:
        moments: (k, width) -> the same times the states' second moments, over all ranks, on the CPU.
        width: d, numbers of a state.
        rank: number of directions.
    """
    shape = (min(rank, width), width)
    words, *_ = philox((torch.arange(shape[0] * width), 0, 0, 0), (0, 0))
    rows = _orthonormal((words.double() / 2**32 - 0.5).view(shape))
    for _ in range(ROUNDS):
        rows = _orthonormal(moments(rows))
    return rows


def _orthonormal(rows: Tensor) -> Tensor:
    """Returns orthonormal rows that span what `rows`, each with those before it, do (Gram-Schmidt, twice)."""
    found = rows[:0]
    for row in rows:
        length, left = by_halves(row * row).sqrt(), row
        for _ in range(2):
            shares = by_halves(found * left)  # (found,)
            left = left - by_halves((found * shares[:, None]).t())
        rest = by_halves(left * left).sqrt()
        if rest > NOTHING * length:
            found = torch.cat([found, (left / rest)[None]])
    return found
