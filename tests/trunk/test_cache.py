"""Caches of hidden states: bounded, whole or not there, and of one data set."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from deep import VISITS, deep, engine_of, numbered
from torch import Tensor

from tezo_ds.trunk.cache import Budget, Cache, MemoryCache
from tezo_ds.trunk.disk import INDEX, STATES, DiskCache


def states(seed: int, tokens: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=["memory", "disk"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Cache:
    budget = Budget(None)
    return (
        MemoryCache(budget, False) if request.param == "memory" else DiskCache(budget, tmp_path, 0)
    )


def test_what_was_put_is_there_to_the_bit(cache: Cache) -> None:
    kept = {
        3: states(3),
        0: states(0, 7),
        9: states(9, 1, torch.bfloat16),
        -1: states(4, 2, torch.float64),
    }
    for example, hidden in kept.items():
        assert cache.tokens_of(example) is None
        cache.put(example, example + 100, hidden[:, :].clone())
    for example, hidden in kept.items():
        assert cache.tokens_of(example) == example + 100
        assert torch.equal(cache.get(example), hidden) and cache.get(example).dtype == hidden.dtype
    cache.put(3, 103, states(8))  # a second time changes nothing
    assert torch.equal(cache.get(3), kept[3])


def test_a_view_of_a_batch_does_not_keep_the_batch(cache: Cache) -> None:
    batch = torch.ones(4, 3, 5)
    cache.put(1, 7, batch[2, :2])
    batch.zero_()
    assert torch.equal(cache.get(1), torch.ones(2, 5))


def test_a_bound_is_kept_and_said_once(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    cache._budget.most = 2 * 60
    with caplog.at_level(logging.WARNING):
        for example in range(4):
            cache.put(example, 1, states(example))
    assert [cache.tokens_of(example) for example in range(4)] == [1, 1, None, None]
    assert caplog.text.count("trunk_cache_gib is reached") == 1


def test_files_of_other_ranks_and_of_an_earlier_process_are_read(tmp_path: Path) -> None:
    for rank in (0, 1):
        DiskCache(Budget(None), tmp_path, rank).put(rank, 7, states(rank))
    budget = Budget(None)
    later = DiskCache(budget, tmp_path, 1)
    for rank in (0, 1):
        assert later.tokens_of(rank) == 7 and torch.equal(later.get(rank), states(rank))
    assert budget.taken == 60  # its own
    later.put(5, 8, states(5))
    assert torch.equal(DiskCache(Budget(None), tmp_path, 2).get(5), states(5))


def test_half_written_and_damaged_examples_are_not_there(tmp_path: Path) -> None:
    first = DiskCache(Budget(None), tmp_path, 0)
    for example in range(3):
        first.put(example, 7, states(example))
    data, index = tmp_path / f"rank0{STATES}", tmp_path / f"rank0{INDEX}"
    raw, lines = data.read_bytes(), index.read_bytes()

    def found(states_: bytes, lines_: bytes) -> list[int]:
        data.write_bytes(states_)
        index.write_bytes(lines_)
        cache = DiskCache(Budget(None), tmp_path, 0)
        there = [example for example in range(3) if cache.tokens_of(example) is not None]
        assert all(torch.equal(cache.get(example), states(example)) for example in there)
        cache.put(1, 7, states(1))  # goes on, whatever it found
        assert torch.equal(cache.get(1), states(1))
        return there

    assert found(raw, lines) == [0, 1, 2]
    assert found(raw, lines[:-9]) == [0, 1]
    assert found(raw[:-1], lines) == [0, 1]
    assert found(b"", lines) == []
    assert found(raw[:60] + b"x" + raw[61:], lines) == [0, 2]
    assert found(raw, b"{}\n[]\nnonsense\n" + lines) == [0, 1, 2]


def test_a_full_disk_leaves_no_half_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def steps(cache: Cache | None) -> list[float]:
        engine = engine_of(deep(), trunk_cache="memory")
        assert engine.objective.trunk is not None
        if cache is not None:
            engine.objective.trunk.cache = cache
        return [engine.step(numbered(rows)).loss for rows in VISITS]

    expected, write, room = steps(None), os.write, [3000]

    def full(handle: int, content: bytes) -> int:
        if len(content) > room[0]:
            room[0] and write(handle, content[: room[0]])
            room[0] = 0
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= len(content)
        return write(handle, content)

    cache = DiskCache(Budget(None), tmp_path, 0)
    with mock.patch.object(os, "write", full), caplog.at_level(logging.WARNING):
        found = steps(cache)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert caplog.text.count("No space left on device; what is not kept yet is computed") == 1
    kept = [example for example in range(9) if cache.tokens_of(example) is not None]
    assert 0 < len(kept) < 9
    again = DiskCache(Budget(None), tmp_path, 0)
    assert [example for example in range(9) if again.tokens_of(example) is not None] == kept
    (tmp_path / f"rank0{STATES}").stat()


def test_memory_that_is_not_there_is_said(caplog: pytest.LogCaptureFixture) -> None:
    cache = MemoryCache(Budget(None), False)
    with (
        mock.patch.object(torch, "empty", side_effect=RuntimeError("can't allocate memory")),
        caplog.at_level(logging.WARNING),
    ):
        cache.put(0, 1, states(0))
    assert cache.full and "trunk cache: can't allocate memory" in caplog.text
