"""A rank that hangs, dies or falls behind: the ranks that survive name it."""

from __future__ import annotations

import json
from pathlib import Path

import hung_ranks
import pytest
from command_line import TIMEOUT, Given, Run
from fault_runs import server
from hung_ranks import LIMIT
from torch.distributed import DistBackendError

from tezo_ds.training.liveness import BEATS, Note, awaited, of_collective

pytest_plugins = ("cli_fixtures",)
pytestmark = [pytest.mark.launches, pytest.mark.waits]

STEP = 4  # in which the trouble comes
SURVIVED = "look at its process and host, then start the same command to go on\n"


@pytest.fixture(scope="module")
def folder(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes the runs' folders, and `ends` with one line for each rank of each run."""
    folder = tmp_path_factory.mktemp("runs")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (folder / "zero3.json").write_text(json.dumps({"zero_optimization": zero, "tezo": {}}))
    runs = []
    for trouble, rank in (("stop", 1), ("kill", 2), ("stop", 0), ("sleep", 1), ("bad row", 1)):
        options = {"steps": 10**6, "lr": 1e-7, "batch_size": 6, "timeout": LIMIT}
        if trouble == "kill":
            options["deepspeed"] = folder / "zero3.json"
        output = folder / f"{trouble}{rank}"
        runs.append((trouble, rank, STEP, given.train(output, test_examples=3, **options)))
    process = server().Process(target=hung_ranks.main, args=(runs, folder / "ends"))
    process.start()
    process.join(TIMEOUT)
    process.kill()
    assert process.exitcode == 0
    return folder


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("[/src/gloo/transport/tcp/pair.cc:537] Connection closed by peer"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (DistBackendError("NCCL error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("no such column"), False),
    ],
)
def test_errors_of_collectives(raised: Exception, expected: bool) -> None:
    try:
        raise KeyError("around it") from raised
    except KeyError as error:
        assert of_collective(error) == expected


def error(folder: Path, trouble: str, rank: int) -> str:
    """Returns the one line, one a host, that the ranks which survived have left."""
    ends = [json.loads(line) for line in (folder / "ends").read_text().splitlines()]
    ends = [end for end in ends if end["run"] == [trouble, rank] and end["rank"] != rank]
    assert len(ends) == 2
    for end in ends:
        assert end["code"] == 2, end
        assert end["seconds"] < 3 * LIMIT
    text = "".join(end["err"] for end in ends)
    assert "Traceback" not in text, text
    (line,) = (line for line in text.splitlines(keepends=True) if line.startswith("tezo-ds:"))
    assert line.startswith(f"tezo-ds: error: rank {rank} (host ")
    run = Run(folder / f"{trouble}{rank}")
    if rank:
        assert run.summary["status"] == "failed" and run.summary["error"] in line
        assert run.summary["steps"] == len(run.steps) == STEP
    return line


def test_a_rank_that_is_stopped_is_named(folder: Path) -> None:
    line = error(folder, "stop", 1)
    assert "has given no sign of life for " in line and line.endswith(SURVIVED)
    assert f"last at the batch of step {STEP} (others are at step {STEP})" in line


def test_a_rank_that_is_killed_is_named_under_zero_3(folder: Path) -> None:
    assert error(folder, "kill", 2).endswith(SURVIVED)


def test_the_rank_with_the_store_is_named_by_the_others(folder: Path) -> None:
    assert "gives no answer" in error(folder, "stop", 0)


def test_a_rank_that_waits_for_its_data_is_named(folder: Path) -> None:
    line = error(folder, "sleep", 1)
    assert f"has not got past the batch of step {STEP} for " in line
    assert f"(others are at step {STEP}); look at what it waits for" in line


def test_a_rank_that_ends_with_an_error_of_its_own_is_named(folder: Path) -> None:
    line = error(folder, "bad row", 1)
    assert f"ended at the batch of step {STEP} (ValueError: bad row); see to that" in line


def test_who_is_awaited() -> None:
    before = [Note(7, 40, "step 19", 0, 0)] * 4
    alive = Note(7 + BEATS, 40, "step 19", 0, 0)
    cases: list[tuple[dict[int, Note], tuple[list[int], str | None]]] = [
        ({}, ([], None)),
        ({2: before[2]}, ([2], "silent")),
        ({3: alive._replace(place=39)}, ([3], "behind")),
        ({2: before[2], 3: alive._replace(place=39)}, ([2], "silent")),  # which explains the rest
        ({1: before[1]._replace(ended="error"), 2: before[2]}, ([1], "ended")),
    ]
    for changed, expected in cases:
        assert awaited(before, [changed.get(rank, alive) for rank in range(4)]) == expected
    with pytest.raises(IndexError):  # notes of as many ranks
        awaited(before[:1], [alive] * 4)
