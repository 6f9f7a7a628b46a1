"""Unbiased stochastic rounding to 16-bit floats.

Rounding to nearest loses an update smaller than half of a weight's last place, step after step. Rounded up
with the probability of what would be lost, the update arrives on average.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.directions.lowrank import Store
from tezo_ds.rng.philox import derive_key, uniforms
from tezo_ds.sharding.view import Piece

_CHUNK = 1 << 17  # elements at a time: keeps half a dozen float64 temporaries within cache
_STOCHASTIC = (torch.bfloat16, torch.float16)


def round_(x: Tensor, dtype: torch.dtype, u: Tensor) -> Tensor:
    """Returns ⌊x/ulp + u⌋ · ulp, with ulp the spacing of `dtype` at |x|: a new tensor, of mean x over u.

    The mean is x itself where x lies at a multiple of ulp/65536, as all float32 do that are normal
    numbers in `dtype`, and within ulp/65536 of it elsewhere. What `dtype` can represent stays itself.
    Infinities, NaN and what exceeds `dtype`'s largest number become what `x.to(dtype)` makes of them.

    Args:
        x: float32 or float64, any shape.
        dtype: bfloat16 or float16.
        u: float32, numbers k/65536 in [0, 1) as of `rng.uniforms`, of x's shape.

    Returns:
        `dtype`, of x's shape.
    """
    limits = torch.finfo(dtype)
    x = x.to(torch.float64)  # holds x/ulp + u: up to 11 bits before the point and 16 after it
    power = (x.view(torch.int64) & 0x7FF << 52).view(torch.float64)  # of two, at most |x|
    ulp = power.mul_(limits.eps).clamp_min_(limits.tiny * limits.eps)
    rounded = (x / ulp).add_(u).floor_().mul_(ulp).copysign_(x)  # by copysign -0 stays itself
    return torch.where(x.abs() <= limits.max, rounded, x).to(dtype)


def store_(piece: Piece, values: Tensor, key: tuple[int, int] | None, step: int) -> None:
    """Writes `values` into the shard of `piece`, by stochastic rounding where its numbers have 16 bits: the
    same on every sharding and replica.

    Args:
        piece: the place to write.
        values: float32 or float64 (len(piece.rows), len(piece.columns)), on the shard's device.
        key: from `rng.derive_key`; None rounds to nearest.
        step: 32-bit; each step rounds by other uniforms.
    """
    if key is None or piece.values.dtype not in _STOCHASTIC:
        piece.values.copy_(values)
        return
    rows = torch.arange(piece.rows.start, piece.rows.stop, device=values.device)
    u = uniforms(key, rows, len(piece.columns), step, piece.columns.start)
    at_once = max(1, _CHUNK // len(piece.columns))
    for kept, new, by in zip(*(t.split(at_once) for t in (piece.values, values, u)), strict=True):
        kept.copy_(round_(new, kept.dtype, by))


class Storing:
    """Rounding without bias, by random numbers addressed by the element: the same on every replica.

    Args:
        seed: the run's seed.
        stochastic: False rounds to the nearest instead, and loses small updates.
    """

    def __init__(self, seed: int, stochastic: bool) -> None:
        self._seed, self._stochastic = seed, stochastic

    @classmethod
    def of(cls, config: TezoConfig) -> Storing:
        """Returns the rounding that a config asks for."""
        return cls(config.seed, config.stochastic_rounding)

    def at(self, purpose: str, time: int) -> Store:
        """Returns the `Store` of one write of every shard; no other has the same purpose and time."""

        def store(piece: Piece, values: Tensor) -> None:
            key = derive_key(self._seed, piece.name, purpose) if self._stochastic else None
            store_(piece, values, key, time)

        return store
