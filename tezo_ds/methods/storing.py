"""How new values go into weights of 16 bits, where most updates are smaller than half an ulp."""

from __future__ import annotations

from torch import Tensor

from tezo_ds.lowrank import Store
from tezo_ds.rng import derive_key
from tezo_ds.rounding import store_
from tezo_ds.sharding.view import Piece


class Storing:
    """Rounds without bias, by random numbers addressed by the element: the same on every replica.

    Args:
        seed: of the run.
        stochastic: False rounds to the nearest instead, and loses small updates.
    """

    def __init__(self, seed: int, stochastic: bool) -> None:
        self._seed, self._stochastic = seed, stochastic

    def at(self, purpose: str, time: int) -> Store:
        """For one write of every shard; no other has the same purpose and time."""

        def store(piece: Piece, values: Tensor) -> None:
            key = derive_key(self._seed, piece.name, purpose) if self._stochastic else None
            store_(piece, values, key, time)

        return store
