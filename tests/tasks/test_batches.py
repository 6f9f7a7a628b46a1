"""The examples that each rank gets at each step."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from tezo_ds.tasks import batch_indices, rounds, shard_range
from tezo_ds.tasks.batches import PIECE, Order, by_length


def sequence(
    n: int,
    batch_size: int,
    world_size: int,
    steps: int,
    seed: int = 0,
    order: Order | None = None,
) -> list[int]:
    return [
        i
        for step in range(steps)
        for rank in range(world_size)
        for i in batch_indices(n, batch_size, step, seed, rank, world_size, order)
    ]


@pytest.mark.parametrize("n", [37, 16, 5])  # more than, as many as, fewer than a global batch
def test_the_order_of_examples_does_not_depend_on_the_world(n: int) -> None:
    expected = sequence(n, batch_size=16, world_size=1, steps=7)
    for world_size in (2, 3, 4, 20):  # evenly, unevenly, and with nothing for some
        assert sequence(n, batch_size=16, world_size=world_size, steps=7) == expected
    for start in range(0, len(expected) - n + 1, n):  # each epoch has each example once
        assert sorted(expected[start : start + n]) == list(range(n))


def test_order_is_shuffled_seeded_and_the_same_for_ever() -> None:
    first = sequence(10, batch_size=10, world_size=1, steps=2)
    assert first[:10] != first[10:]
    assert first != sequence(10, batch_size=10, world_size=1, steps=2, seed=1)
    assert first == GOLDEN_ORDER
    assert batch_indices(10, 7, step=3, seed=0, rank=1, world_size=2) == sequence(10, 7, 1, 4)[-4:]


GOLDEN_ORDER = [5, 0, 7, 9, 4, 1, 2, 8, 6, 3, 3, 8, 4, 2, 0, 6, 7, 9, 5, 1]


def test_order_is_uniform() -> None:
    firsts = Counter(batch_indices(4, 4, step, 0, 0, 1)[0] for step in range(400))
    assert all(70 <= firsts[i] <= 130 for i in range(4))  # 100 expected, standard deviation 9


@pytest.mark.parametrize("n", [3 * PIECE * 4 + 7, PIECE * 4 + 1, 37, 9, 4, 3])
def test_batches_of_like_lengths_drop_nothing_and_know_no_world(n: int) -> None:
    lengths = [17 * i % 101 for i in range(n)]
    order, steps = by_length(lengths, 4, seed=5), 3 * n // 4 + 1
    found = sequence(n, 4, 1, steps, 5, order)
    for start in range(0, 3 * n, n):  # each epoch has each example once
        assert sorted(found[start : start + n]) == list(range(n))
    assert n < 9 or found[:n] != found[n : 2 * n]
    assert sequence(n, 4, 3, steps, 5, by_length(lengths, 4, seed=5)) == found
    again = by_length(lengths, 4, seed=5)  # as after a resume, from the last step on
    last = [i for rank in range(2) for i in batch_indices(n, 4, steps - 1, 5, rank, 2, again)]
    assert last == found[-4:]
    assert n < 9 or found != sequence(n, 4, 1, steps, 6, by_length(lengths, 4, seed=6))


def test_batches_of_like_lengths_are_so_across_epochs_and_shuffled() -> None:
    lengths = [17 * i % 101 for i in range(801)]  # no whole number of batches
    order = by_length(lengths, 4, seed=0)

    def spans(order: Order | None) -> list[int]:
        found = sequence(801, 4, 1, 500, 0, order)
        batches = [[lengths[i] for i in found[k : k + 4]] for k in range(0, 2000, 4)]
        return [max(batch) - min(batch) for batch in batches]

    assert max(spans(order)) < 15 < 50 < sum(spans(None)) / 500
    longest = [max(lengths[i] for i in order(0)[k : k + 4]) for k in range(0, 800, 4)]
    falls = sum(one > other for one, other in pairwise(longest))
    assert 70 < falls < 130  # neither falling nor rising in a piece


@pytest.mark.parametrize(("n", "world_size"), [(10, 4), (3, 4), (0, 2), (8, 1)])
def test_shard_ranges_cover_each_example_once(n: int, world_size: int) -> None:
    shares = [shard_range(n, rank, world_size) for rank in range(world_size)]
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_rounds_is_what_the_largest_share_needs() -> None:
    assert rounds(10, batch_size=2, world_size=4) == 2  # shares of 2, 3, 2, 3
    assert rounds(8, batch_size=2, world_size=4) == 1
    assert rounds(3, batch_size=2, world_size=4) == 1
    assert rounds(0, batch_size=2, world_size=4) == 0
    for n in range(1, 40):
        largest = max(len(shard_range(n, rank, 3)) for rank in range(3))
        assert rounds(n, 4, 3) == -(-largest // 4)


def test_senseless_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 0 examples; at least 1 needed"):
        batch_indices(0, 4, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="rank 2 is not in a world of 2"):
        batch_indices(8, 4, 0, 0, 2, 2)
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        batch_indices(8, 0, 0, 0, 0, 1)
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        rounds(8, 0, 1)
