"""Examples that each rank takes: pure functions of step, seed and world, with no state."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

PIECE = 50  # batches that are sorted by length together

Order = Callable[[int], np.ndarray]  # from an epoch to its order of all examples


def batch_indices(
    n: int,
    batch_size: int,
    step: int,
    seed: int,
    rank: int,
    world_size: int,
    order: Order | None = None,
) -> list[int]:
    """Returns this rank's share of the step's `batch_size` examples: indices below n.

    The examples come in one endless sequence, a fresh permutation of range(n) for each epoch, no
    example dropped at its end; a step takes the next piece, and the ranks split it in order, evenly
    to within one. So a step's examples are the same for any number of ranks, and a run can resume on
    another number of ranks. `order` gives other permutations, such as `by_length`.
    """
    _check(n, rank, world_size)
    if batch_size < 1 or step < 0:
        raise ValueError(f"batch_size {batch_size} must be at least 1, and step {step} at least 0")
    first = step * batch_size
    share = shard_range(batch_size, rank, world_size)
    places = (divmod(first + place, n) for place in share)
    orders = order or (lambda epoch: _permutation(n, seed, epoch))
    return [int(orders(epoch)[i]) for epoch, i in places]


def by_length(lengths: Sequence[int], batch_size: int, seed: int) -> Order:
    """Returns the order of epochs whose batches are of like lengths, for `batch_indices`.

    Each epoch's permutation is cut into pieces of `PIECE` batches (of few examples into four pieces), each
    sorted by length and cut into batches, which come in a fresh order, as in transformers' Trainer. A
    batch that lies across two epochs takes the shortest of a piece on either side, so that its examples
    are alike as well.
    """
    sizes = np.asarray(lengths)
    n = len(sizes)
    piece = batch_size * max(1, min(PIECE, n // (4 * batch_size)))

    @lru_cache(maxsize=2)  # a batch may lie across the end of an epoch
    def order(epoch: int) -> np.ndarray:
        drawn = _permutation(n, seed, epoch)
        head = -epoch * n % batch_size  # examples that the last epoch's last batch lacks
        if head + batch_size > n:
            return drawn
        bounds = [0, *range(head + piece, n - piece // 2, piece), n]
        pieces = [drawn[start:end] for start, end in pairwise(bounds)]
        pieces = [each[longest_first(sizes[each])] for each in pieces]
        first, pieces[0] = np.split(pieces[0], [len(pieces[0]) - head])[::-1]
        sequence = np.concatenate(pieces)
        count = len(sequence) // batch_size
        whole, last = np.split(sequence, [count * batch_size])
        shuffled = whole.reshape(count, batch_size)[_draw(count, f"{seed}:by length", epoch)]
        return np.concatenate([first, shuffled.ravel(), last])

    return order


def longest_first(lengths: Sequence[int] | np.ndarray) -> list[int]:
    """Returns places by length, the longest first and equal ones in their order: batches of them pad little.

    So the largest batch comes first, and one that does not fit into memory shows at once.
    """
    return [int(place) for place in np.argsort(-np.asarray(lengths, np.int64), kind="stable")]


def lane_indices(
    n: int, batch_size: int, step: int, seed: int, rank: int, world_size: int
) -> list[int]:
    """Returns this rank's share of the step's `batch_size` examples; each always comes to the same rank.

    The first epoch is that of `batch_indices`. Its examples at place j of their steps are lane j, which goes
    on at place j of later steps, in a fresh order of its own each time that it begins again. A step has the
    same examples on any number of ranks.
    """
    _check(n, rank, world_size)
    first, found = _permutation(n, seed, 0), []
    for place in shard_range(batch_size, rank, world_size):
        lane = first[place % n :: batch_size]  # above n, one example alone
        epoch, index = divmod(step, len(lane))
        order = _lane(len(lane), f"{seed}:lane{place}", epoch) if epoch else range(len(lane))
        found.append(int(lane[order[index]]))
    return found


def lane_places(count: int, batch_size: int, rank: int, world_size: int) -> list[int]:
    """Returns which of the first epoch's first `count` places `lane_indices` gives to a rank."""
    share = shard_range(batch_size, rank, world_size)
    return [place for place in range(count) if place % batch_size in share]


def _draw(n: int, seed: int | str, epoch: int) -> np.ndarray:
    """Returns a permutation of range(n).

    Sorts the raw output of Philox, because NumPy promises that bit generators' streams stay the
    same over its versions, and does not promise it of `Generator.permutation`.
    """
    key = int.from_bytes(hashlib.sha256(f"batches:{seed}:{epoch}".encode()).digest()[:16], "big")
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


_permutation = lru_cache(maxsize=4)(_draw)  # a batch may lie across the end of an epoch
_lane = lru_cache(maxsize=256)(_draw)  # each lane has an order of its own


def shard_range(n: int, rank: int, world_size: int) -> range:
    """Returns this rank's contiguous share of range(n); shares cover range(n) once, evenly to within one."""
    _check(n, rank, world_size, least=0)
    return range(n * rank // world_size, n * (rank + 1) // world_size)


def rounds(n: int, batch_size: int, world_size: int) -> int:
    """Returns how many batches the largest `shard_range` needs; all ranks run as many, to stay in step.

    A rank whose share has run out goes on with empty batches (see `collate`'s filler).
    """
    _check(n, 0, world_size, least=0)
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    return math.ceil(math.ceil(n / world_size) / batch_size)


def _check(n: int, rank: int, world_size: int, least: int = 1) -> None:
    if n < least:
        raise ValueError(f"there are {n} examples; at least {least} needed")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}")
