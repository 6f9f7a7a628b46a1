"""The runner of worlds in helpers/worlds.py."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import worlds
from command_line import TIMEOUT
from failing_cases import run
from fault_runs import server
from once import once


@pytest.mark.launches
def test_a_case_that_fails_on_one_rank_fails_at_once_on_all(tmp_path: Path) -> None:
    """A failed case ends at once on all ranks, where gloo alone would wait a minute, and the next case has
    a new world."""
    process, started = server().Process(target=run, args=(tmp_path,)), time.monotonic()
    process.start()
    process.join(TIMEOUT)
    process.kill()
    assert process.exitcode == 0 and time.monotonic() - started < 50
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert {name.split(".")[1]: len(found) for name, found in errors.items()} == {
        "goes_well": 0, "fails_on_one_rank": 2, "hangs_on_the_other": 1, "goes_well_again": 0,
    }  # fmt: skip
    first, then = errors["failing_cases.fails_on_one_rank"]
    assert first.startswith("rank 1 failed first: Traceback") and "the first to fail" in first
    assert then.startswith("then rank 0: ") and "\n" not in then


def test_what_is_made_once_is_read_by_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(worlds.ONCE, str(tmp_path))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    made: list[tuple[str, bool]] = []

    def make(name: str) -> torch.Tensor:
        made.append((name, dist.is_initialized()))
        return torch.randn(5)

    found = []
    for name in ("one", "other", "one", "other"):
        found.append(once(make)(name))  # which knows nothing yet, as in another process
    assert made == [("one", False), ("other", False)], "made again, or with other ranks"
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])
