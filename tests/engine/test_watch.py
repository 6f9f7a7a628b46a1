"""Digests of replicas: which changes they show, which they must not show, and how messages name ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch
from command_line import Given, Run, finish, free_port, start
from safetensors.torch import load_file

from tezo_ds.engine import replicas
from tezo_ds.engine.replicas import digest
from tezo_ds.run.folder import (
    ADAPTER,
    COEFFICIENTS,
    CONFIG,
    CURVE,
    JOURNAL,
    LOCK,
    METRICS,
    REPORT,
    SUMMARY,
)

pytest_plugins = ("cli_fixtures",)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)
NUMEL = 203  # ends inside a word of 4 bytes where that holds several elements


def values(dtype: torch.dtype, numel: int = NUMEL) -> torch.Tensor:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (100 * x).to(dtype)


@pytest.fixture(params=(replicas.CHUNK, 16))
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sets the chunk of a digest to its default, or to one so small that tensors take many."""
    monkeypatch.setattr(replicas, "CHUNK", request.param)
    replicas._multipliers.cache_clear()
    yield
    replicas._multipliers.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_bit_of_any_element_shows(chunk: None, dtype: torch.dtype) -> None:
    x = values(dtype)
    bits = x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])
    before, seen = digest(x), set()
    for place in range(NUMEL):
        bits[place] ^= 1
        seen.add(digest(x))
        bits[place] ^= 1
    assert digest(x) == before
    assert len(seen | {before}) == NUMEL + 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_changes_of_sign_show(dtype: torch.dtype) -> None:
    """Hazard: the top bit of a word times an odd number is the top bit again, so two changes of sign would
    cancel."""
    x = values(dtype, numel=40)
    seen = {digest(x)}
    for pair in combinations(range(len(x)), 2):
        changed = x.clone()
        changed[list(pair)] *= -1
        seen.add(digest(changed))
    assert len(seen) == 1 + 40 * 39 // 2

    def cancels(words: torch.Tensor) -> int:
        return int((words * replicas._multipliers(words.device)[: len(words)]).sum())

    doubles = values(torch.float64, numel=40)
    assert cancels(doubles.view(torch.int64)) == cancels((-doubles).view(torch.int64))
    assert digest(doubles) != digest(-doubles)


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_shows(chunk: None, dtype: torch.dtype) -> None:
    x = values(dtype)
    for shift in (1, 2, 8, 16, 64, 100):  # elements, words, chunks
        moved = x.roll(shift)
        assert moved.double().sum() == pytest.approx(x.double().sum())  # which a sum would miss
        assert digest(moved) != digest(x)


def test_zero_has_a_sign_and_nan_is_equal_to_itself() -> None:
    zeros = torch.zeros(9)
    assert torch.equal(zeros, -zeros) and digest(zeros) != digest(-zeros)
    nans = zeros / 0
    assert not torch.equal(nans, nans) and digest(nans) == digest(nans.clone())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_place_in_memory_does_not_matter(chunk: None, dtype: torch.dtype) -> None:
    x = values(dtype)
    for offset in range(5):
        storage = torch.zeros(NUMEL + 9, dtype=dtype)
        elsewhere = storage[offset : offset + NUMEL]
        elsewhere.copy_(x)
        assert digest(elsewhere) == digest(x)
    assert digest(x[:0]) == digest(torch.empty(0, dtype=dtype)) == 0


def test_messages_name_the_minority_and_shorten_long_lists() -> None:
    gathered = [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1, "b": 2}, {"b": 9}]
    assert replicas._differences(gathered) == [("b", {0: 2, 1: 3, 2: 2, 3: 9})]
    assert replicas._differences(gathered, absent="no")[0] == ("a", {0: 1, 1: 1, 2: 1, 3: "no"})
    assert replicas.listed([3]) == "rank 3"
    assert replicas.listed(range(1, 1000)) == "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 991 more"


# Rank 1 loses a bit, and rank 0 is slow to write its results: long enough for the launcher to notice
# that rank 1 has failed, and to ask rank 0 to end.
SPOILT = """
import gc, math, os, time
gc.disable()  # as collections would go through what is imported again and again
from tezo_ds.cli import main
from tezo_ds.training import loop as training
from tezo_ds.methods.tezo import Tezo
gc.freeze()
gc.enable()

update, write = Tezo.update, training.write_results

def spoil(self, *args):
    update(self, *args)
    spoil.steps += 1
    if os.environ["RANK"] == "1" and spoil.steps == 4:
        self.coefficients[5] = math.nextafter(self.coefficients[5].item(), math.inf)

def write_slowly(*args):
    time.sleep(3)
    write(*args)

spoil.steps = 0
Tezo.update, training.write_results = spoil, write_slowly
main()
"""


@pytest.mark.launches
@pytest.mark.waits
def test_a_run_whose_replicas_differ_ends_with_whole_files(given: Given, tmp_path: Path) -> None:
    (tmp_path / "spoilt.py").write_text(SPOILT)
    run = Run(tmp_path / "run")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2)
    port = ("--master-port", free_port())
    arguments = given.train(run.path, check_every=2)
    code, _, err = finish(start(*launcher, *port, tmp_path / "spoilt.py", *arguments))
    assert code != 0
    assert "closing signal SIGTERM" in err  # the launcher's
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = f"after 4 steps: coefficients of {name} on rank 1 differ from those on rank 0; "
    assert err.count(f"tezo-ds: error: {expected}") == 1
    assert run.summary["status"] == "failed"
    assert run.summary["error"].startswith(expected)
    assert run.summary["steps"] == len(run.steps) == 4
    files = {CONFIG, JOURNAL, LOCK, METRICS, SUMMARY, COEFFICIENTS, ADAPTER, CURVE, REPORT}
    assert {path.name for path in run.path.iterdir()} == files
    assert load_file(run.path / ADAPTER / "adapter_model.safetensors")
