"""Digests of all that must hold the same bits on several ranks: replicas stay equal, or the run stops.

While all is well a check is one all-reduce of three numbers and, where weights were written, one of two
numbers for each set of replicas. Only when replicas differ do ranks exchange digests of single matrices,
to name the first that differs and on which ranks.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.directions.space import CoefficientSpace, Packed
from tezo_ds.errors import ConfigError, ShardingError
from tezo_ds.rng.philox import philox
from tezo_ds.sharding import Sharding, ShardView
from tezo_ds.sharding.view import ShardKey

CHUNK = 1 << 18  # words of 4 bytes digested at a time, a square number
_SPREAD = -0x61C8864680B583EB  # odd, so that a product with it loses nothing modulo 2**64
_LOWEST = -(1 << 63)  # of int64: says nothing in a maximum
_SHOWN = 8  # ranks listed in a message

Ranks = tuple[int, ...]


def digest(shard: Tensor) -> int:
    """Returns a 64-bit digest of a 1-D tensor's bits, wherever in memory the tensor lies.

    The sum modulo 2**64 of its 4-byte words, each times an odd number drawn for its place. Integers,
    so exact in any order of summing; a change within any single word always shows. (Words of 8 bytes
    would halve the work, but their top bits, which are signs, meet nothing of a multiplier but its
    lowest bit: any two changes of sign would cancel.) Works on the tensor's own device, in
    temporaries of at most 12 · CHUNK bytes.
    """
    multipliers = _multipliers(shard.device)
    total = torch.zeros((), dtype=torch.int64, device=shard.device)
    words = -(-shard.numel() * shard.itemsize // 4)
    products = torch.empty(min(words, CHUNK), dtype=torch.int64, device=shard.device)
    at_once = CHUNK * 4 // shard.itemsize
    for start in range(0, shard.numel(), at_once):
        part = _words(shard[start : start + at_once])
        part = products[: len(part)].copy_(part).mul_(multipliers[: len(part)])
        total.mul_(_SPREAD).add_(part.sum())
    return int(total)


def _words(part: Tensor) -> Tensor:
    """Returns a tensor's bits as int32, the last word filled up with zeros."""
    missing = -part.numel() * part.itemsize % 4 // part.itemsize
    if missing or part.storage_offset() * part.itemsize % 4:
        part = torch.cat([part, part.new_zeros(missing)])
    return part.view(torch.int32)


@functools.cache
def _multipliers(device: torch.device) -> Tensor:
    """Returns an odd number for each word of a chunk: int64 (CHUNK,), products of a few random ones."""
    side = math.isqrt(CHUNK)
    low, high, *_ = philox((torch.arange(2 * side, device=device), 0, 0, 0), (0, 0))
    rows, columns = (high << 32 | low | 1).split(side)
    return (rows[:, None] * columns).flatten()


def _fold(content: Any) -> int:
    """Returns a 64-bit digest, as int64, of the `repr` of plain values."""
    hashed = hashlib.blake2b(repr(content).encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "little", signed=True)


def _both_ends(value: int) -> tuple[int, int]:
    """Returns two numbers whose maxima over ranks are complements if all ranks gave the same value."""
    return ~value, value


def holders_of(
    sharding: Sharding, keys: Sequence[ShardKey]
) -> tuple[dict[ShardKey, Ranks], list[Ranks]]:
    """Finds the ranks that hold the same shards; all ranks must call it.

    Keys travel as 8 bytes each: there may be 10,000 of them on each of 1,000 ranks.

    Args:
        sharding: the world.
        keys: keys of the shards that this rank holds.

    Returns:
        The ranks that hold each shard of this rank, in order; and every set of several ranks that hold
        the same shards, with or without this rank, alike on every rank.
    """
    holders: dict[int, list[int]] = {}
    for rank, held in enumerate(sharding.gather([_fold(key) for key in keys])):
        for key in dict.fromkeys(held):
            holders.setdefault(key, []).append(rank)
    sets = {tuple(held) for held in holders.values() if len(held) > 1}
    return {key: tuple(holders[_fold(key)]) for key in keys}, sorted(sets)


def require_same_start(sharding: Sharding, config: TezoConfig) -> None:
    """Compares the `tezo` block and the model's parameters over all ranks, which must all call it.

    Raises:
        ConfigError: ranks differ; names the first difference and the ranks.
    """
    mine: dict[str, Any] = config.model_dump()
    for name, parameter in sharding.module.named_parameters():
        trains = "" if parameter.requires_grad else ", frozen"
        mine[name] = f"{tuple(sharding.shape(parameter))} {parameter.dtype}{trains}"
    low, high = sharding.maxima(_both_ends(_fold(mine)))
    if low == ~high:
        return
    different = _differences(sharding.gather(mine), absent="missing")
    item, by_rank = different[0]
    values = "; ".join(
        f"{value} on {listed([rank for rank in by_rank if by_rank[rank] == value])}"
        for value in dict.fromkeys(by_rank.values())
    )
    raise ConfigError(
        f"ranks were not started alike: {item} is {values}{_and_more(different)}; start all with the "
        "same config, flags and model"
    )


class Watch:
    """Comparison, over all ranks, of the state and weights that must be equal on several of them.

    Replicas are found by the keys of shards, which works for any sharding.
    """

    def __init__(self, sharding: Sharding, space: CoefficientSpace) -> None:
        self._sharding, self._space = sharding, space
        self._keys: list[ShardKey] = []  # held by this rank when replicas were last looked for
        self._replicas: dict[ShardKey, Ranks] = {}  # those of them that further ranks hold
        self._sets: list[Ranks] = []  # of ranks that hold the same shards; alike on every rank

    def check(self, state: Mapping[str, Packed], step: int, weights: bool) -> None:
        """Compares state and weights. All ranks must call it, and all of them raise or none.

        Args:
            state: the method's state.
            step: steps taken.
            weights: whether the shards may have been written since the last check.

        Raises:
            ShardingError: ranks differ; names which, and the first parameter.
        """
        if self._sharding.everyone == 1:
            return
        taken = {"numbers of steps taken": step, "parts that are checked": weights}
        own = _fold({**taken, **{name: digest(part.data) for name, part in state.items()}})
        keys = self._held() if weights else self._keys
        low, high, moved = self._sharding.maxima([*_both_ends(own), keys != self._keys])
        if low != ~high:
            self._stop({**taken, **self._by_matrix(state)}, step)
        if moved:
            self._find_replicas(keys)
        if weights:
            self._check_shards(step)

    def _by_matrix(self, state: Mapping[str, Packed]) -> dict[str, int]:
        return {
            f"{kind} of {name}": digest(part)
            for kind, packed in state.items()
            for name, part in packed.split().items()
        }

    def _held(self) -> list[ShardKey]:
        keys: list[ShardKey] = []

        def note(view: ShardView) -> None:
            if view.numel:
                keys.append(view.key)

        self._sharding.each_shard(self._space.slices.keys(), note)
        return keys

    def _find_replicas(self, keys: list[ShardKey]) -> None:
        ranks, self._sets = holders_of(self._sharding, keys)
        self._keys = keys
        self._replicas = {key: held for key, held in ranks.items() if len(held) > 1}

    def _check_shards(self, step: int) -> None:
        if not self._sets:
            return
        found: dict[ShardKey, int] = {}

        def look(view: ShardView) -> None:
            if view.key in self._replicas:
                found[view.key] = digest(view.local)

        self._sharding.each_shard(self._space.slices.keys(), look)
        numbers: list[int] = []
        for ranks in self._sets:
            mine = [(key, found[key]) for key in found if self._replicas[key] == ranks]
            numbers += _both_ends(_fold(mine)) if mine else (_LOWEST, _LOWEST)
        largest = self._sharding.maxima(numbers)
        if any(low != ~high for low, high in zip(largest[::2], largest[1::2], strict=True)):
            self._stop(found, step)

    def _stop(self, mine: Mapping[Any, Any], step: int) -> None:
        different = _differences(self._sharding.gather(mine))
        if not different:
            raise ShardingError(
                f"after {step} steps: ranks differed and at a second look do not; check their hardware"
            )
        item, by_rank = different[0]
        common, _ = Counter(by_rank.values()).most_common(1)[0]  # of equals the lowest rank's
        odd = listed([rank for rank in by_rank if by_rank[rank] != common])
        rest = listed([rank for rank in by_rank if by_rank[rank] == common])
        what = item if isinstance(item, str) else f"weights of {item[0]}"
        raise ShardingError(
            f"after {step} steps: {what} on {odd} differ from those on {rest}{_and_more(different)}; "
            "go back to a model and coefficients that agree, and check that these ranks have the same "
            "files and libraries, and sound hardware"
        )


def _differences(
    gathered: Sequence[Mapping[Any, Any]], absent: Any = None
) -> list[tuple[Any, dict[int, Any]]]:
    """Returns items whose values differ, each with its value by rank; ranks that lack an item have
    `absent`, or do not count where `absent` is None."""
    columns = {
        item: {
            rank: held.get(item, absent)
            for rank, held in enumerate(gathered)
            if item in held or absent is not None
        }
        for item in dict.fromkeys(chain.from_iterable(gathered))
    }
    return [(item, by_rank) for item, by_rank in columns.items() if len(set(by_rank.values())) > 1]


def _and_more(different: Sequence[object]) -> str:
    return f" (and {len(different) - 1} more differ)" if len(different) > 1 else ""


def listed(ranks: Sequence[int]) -> str:
    """Returns some ranks in words."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return "ranks " + ", ".join(map(str, ranks[:_SHOWN])) + more
