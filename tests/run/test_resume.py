"""Resumed runs: bit for bit the run that was never interrupted, however it ended."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import STEPS, Given, Run, call
from other_kernels import OtherKernels
from safetensors.torch import load_file

from tezo_ds.engine.measuring import Measuring
from tezo_ds.run.folder import (
    ADAPTER,
    COEFFICIENTS,
    CONFIG,
    CURVE,
    JOURNAL,
    METRICS,
    MODEL,
    REPORT,
    SNAPSHOTS,
    SUMMARY,
    RunFolder,
)
from tezo_ds.run.journal import read_journal

pytest_plugins = ("cli_fixtures",)

WAYS: dict[str, dict[str, Any]] = {
    "tezo": {"clip_kappa": 0.8, "queries": 2},
    "tezo-m": {"refresh_every": 2},
    "tezo-adam-coef": {"rank": "auto", "rank_max": 3, "rank_threshold": 0.1},
    "tezo-gn": {"queries": 3, "lr": 0.5, "refresh_every": 2, "keep_periods": 3},
    "adapter tt": {
        "method": "tezo-m",
        "adapter": "tt",
        "bottleneck": 6,
        "tt_init": "published",
        "queries_max": 3,
        "query_schedule": "adazeta",
        "query_beta": 1.0,
    },
    "adapter lora": {"method": "tezo-adam-coef", "adapter": "lora", "placement": "per_example"},
    "tezo-adam": {"train_vectors": True, "rho": "auto"},
    "lozo-m": {"rank": 2, "nu": 2, "lr": 2e-4},
    "mezo": {"rank": None, "lr": 2e-4, "dtype": "bfloat16"},
    "mezo-adam": {"rank": None, "lr": 2e-4, "include": "*v_proj*"},
}

Captured = pytest.CaptureFixture[str]


class Killed(BaseException):
    """The end of a process that is gone: nothing more is written."""


def killed_after(steps: int, arguments: list[str], patch: pytest.MonkeyPatch) -> None:
    """Runs until step `steps` is in the journal, and ends as a killed process does."""
    log_step = RunFolder.log_step

    def log(folder: RunFolder, report: Any, *more: Any) -> None:
        log_step(folder, report, *more)
        if report.step + 1 == steps:
            raise Killed

    with patch.context() as gone, pytest.raises(Killed):
        gone.setattr(RunFolder, "log_step", log)
        gone.setattr("tezo_ds.training.loop.write_results", lambda *_: None)
        call(*arguments)


def result(run: Path) -> dict[str, torch.Tensor]:
    weights = run / MODEL / "model.safetensors"
    if weights.exists():
        return load_file(weights)
    if (run / MODEL).exists():
        parts = [load_file(part) for part in sorted((run / MODEL).glob("*.safetensors"))]
        return {name: tensor for part in parts for name, tensor in part.items()}
    return load_file(run / COEFFICIENTS)


def kappas(run: Path) -> list[Any]:
    return [(line["kappa"], line["loss"]) for line in read_journal(run / JOURNAL).steps]


def same(one: Path, other: Path) -> bool:
    mine, its = result(one), result(other)
    return mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test with the kernels of this machine, or with another maker's."""
    with nullcontext() if request.param == "own" else OtherKernels(request.param):
        yield


@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize(
    ("kernels", "snapshot_every"), [("own", 0), ("shapes", 2)], indirect=["kernels"]
)
def test_a_run_that_was_killed_goes_on_bit_for_bit(
    given: Given, method: str, snapshot_every: int, kernels: None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: Captured,
) -> None:  # fmt: skip
    options = {"method": method, **WAYS[method], "snapshot_every": snapshot_every}
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert call(*given.train(whole, **options)) == 0
    arguments = given.train(run, **options)
    killed_after(3, arguments, monkeypatch)
    assert not {SUMMARY, COEFFICIENTS, MODEL} & {path.name for path in run.iterdir()}
    killed_after(5, arguments, monkeypatch)
    with (run / JOURNAL).open("a") as journal:
        journal.write('{"step":5,"ka')
    capfd.readouterr()
    assert call(*arguments) == 0
    out = capfd.readouterr().out
    assert f"{run} goes on after 5 steps" in out and "line 7 was not written to its end" in out
    replayed = 1 if snapshot_every else 5
    assert f"replaying {replayed} steps of {JOURNAL}" in out
    assert kappas(run) == kappas(whole)
    assert same(run, whole)
    one, other = Run(run), Run(whole)
    assert [line["step"] for line in one.steps] == list(range(STEPS))
    for name in ("test_loss_before", "test_loss_after", "accuracy_before", "steps", "status"):
        assert one.summary[name] == other.summary[name]


def test_a_memory_budget_is_measured_once_a_run(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard: a process that resumes begins with another batch, whose shapes could give another budget and
    other last bits."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = {"queries": 8, "memory_budget": 2e-4, "max_length": 9}
    with OtherKernels("shapes"):
        assert call(*given.train(whole, **options)) == 0
        killed_after(3, given.train(run, **options), monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(Measuring, "_measure_cost", None)
            assert call(*given.train(run, **options)) == 0
    assert kappas(run) == kappas(whole) and same(run, whole)
    cost = read_journal(run / JOURNAL).steps[0]["cost"]
    at_once = (options["memory_budget"] * 2**30 - cost["fixed"]) / (cost["each"] * 4 * 9)
    assert 1 < at_once < 16, "no part of the branches goes at once"
    assert call(*given.train(whole, steps=STEPS + 1, fsdp=True, **options)) == 0  # measured again
    torch.distributed.destroy_process_group()  # a world of one rank, which later tests would find
    costs = [line["cost"]["where"] for line in read_journal(whole / JOURNAL).steps]
    assert costs == ["Replicated on 1 rank(s)"] * STEPS + ["Fsdp2 on 1 rank(s)"]


def test_a_finished_run_has_nothing_to_do_and_may_be_made_longer(
    given: Given, tmp_path: Path, capfd: Captured
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert call(*given.train(run)) == 0
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    capfd.readouterr()
    assert call(*given.train(run)) == 0
    assert (
        capfd.readouterr().out == f"{run} is finished after {STEPS} steps; there is nothing to do\n"
    )
    after = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    assert {p: t for p, t in after.items() if p.name != ".lock"} == {
        p: t for p, t in before.items() if p.name != ".lock"
    }
    assert call(*given.train(run, steps=STEPS + 2)) == 0
    assert call(*given.train(whole, steps=STEPS + 2)) == 0
    assert same(run, whole) and Run(run).summary["steps"] == STEPS + 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": 0.004}, "of lr 0.002, not 0.004"),
        ({"seed": 4}, "of seed 3, not 4"),
        ({"method": "tezo-m"}, "of method 'tezo', not 'tezo-m'"),
        ({"batch_size": 2}, "of batch_size 4, not 2"),
        ({"max_length": 33}, "of max_length 512, not 33"),
        ({"train_examples": 5}, "of train_examples None, not 5"),
        ({"schedule": "linear"}, "of schedule 'constant', not 'linear'"),
        ({"dtype": "bfloat16", "steps": 8}, "of factors_dtype 'float32', not 'bfloat16'"),
        ({"resume": False}, "holds a run already; choose another --output"),
    ],
)
def test_another_run_does_not_go_on(
    given: Given, plain: Run, options: dict[str, Any], named: str, tmp_path: Path, capfd: Captured
) -> None:
    run = tmp_path / "run"
    shutil.copytree(plain.path, run)
    capfd.readouterr()
    assert call(*given.train(run, eval_every=4, **options)) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"tezo-ds: error: {run} ") and err.count("\n") == 1
    assert named in err
    assert result(run).keys() == plain.coefficients.keys()  # and nothing was touched


def test_other_examples_are_another_run(given: Given, tmp_path: Path, capfd: Captured) -> None:
    shutil.copy(given.data, tmp_path / "films.jsonl")
    moved = Given(given.model, tmp_path / "films.jsonl")
    assert call(*moved.train(tmp_path / "run", steps=2)) == 0
    (tmp_path / "films.jsonl").write_text(given.data.read_text().replace("felt", "feels"))
    assert call(*moved.train(tmp_path / "run", steps=3)) == 2
    assert (
        "films.jsonl, as the model's tokenizer encodes them, are not those"
        in capfd.readouterr().err
    )


def test_ranks_that_were_changed_are_another_run(
    given: Given, tmp_path: Path, capfd: Captured
) -> None:
    run = tmp_path / "run"
    options = {"rank": "auto", "rank_max": 3, "steps": 2}
    assert call(*given.train(run, **options)) == 0
    config = json.loads((run / CONFIG).read_text())
    name = next(name for name, rank in config["ranks"].items() if rank > 1)
    config["ranks"][name] -= 1
    (run / CONFIG).write_text(json.dumps(config))
    assert call(*given.train(run, **{**options, "steps": 3})) == 2
    assert "holds a run of ranks " in capfd.readouterr().err


def test_a_schedule_that_ends_fixes_the_length(
    given: Given, tmp_path: Path, capfd: Captured
) -> None:
    run = tmp_path / "run"
    assert call(*given.train(run, schedule="linear")) == 0
    assert call(*given.train(run, schedule="linear", steps=9)) == 2
    assert f"of total_steps {STEPS}, not 9" in capfd.readouterr().err


def test_resume_of_nothing_is_refused(given: Given, tmp_path: Path, capfd: Captured) -> None:
    assert call(*given.train(tmp_path / "run", resume=True)) == 2
    assert "holds no run that has begun" in capfd.readouterr().err


def test_a_second_run_in_the_folder_is_refused(
    given: Given, tmp_path: Path, capfd: Captured
) -> None:
    run = tmp_path / "run"
    first = RunFolder(run)
    assert call(*given.train(run)) == 2
    assert f"{run}: process {os.getpid()} on " in capfd.readouterr().err
    first.close()
    assert call(*given.train(run, steps=1)) == 0


def test_a_damaged_snapshot_is_left_for_the_one_before(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = {"snapshot_every": 2, "method": "tezo-m"}
    assert call(*given.train(whole, **options)) == 0
    killed_after(5, given.train(run, **options), monkeypatch)
    names = sorted(path.name for path in (run / SNAPSHOTS).iterdir())
    assert names == ["step-00000002.safetensors", "step-00000004.safetensors"]
    newest = run / SNAPSHOTS / names[-1]
    content = bytearray(newest.read_bytes())
    content[-3] ^= 4  # in the numbers, which safetensors itself does not check
    newest.write_bytes(content)
    capfd.readouterr()
    assert call(*given.train(run, **options)) == 0
    out = capfd.readouterr().out
    assert "does not have its checksum" in out and f"replaying 3 steps of {JOURNAL}" in out
    assert same(run, whole)


def test_a_snapshot_of_another_journal_is_not_taken(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    killed_after(3, given.train(run, snapshot_every=2), monkeypatch)
    killed_after(3, given.train(other, snapshot_every=2, lr=1e-3), monkeypatch)
    shutil.copytree(other / SNAPSHOTS, run / SNAPSHOTS, dirs_exist_ok=True)
    capfd.readouterr()
    assert call(*given.train(run, snapshot_every=2)) == 0
    assert f"replaying 3 steps of {JOURNAL}" in capfd.readouterr().out


def test_replay_of_every_step_digests_to_what_the_run_had(given: Given, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call(*given.train(run, check_every=2)) == 0
    lines = read_journal(run / JOURNAL).steps
    assert ["state" in line for line in lines] == [False, True] * 3
    assert len({line["state"] for line in lines if "state" in line}) == 3
    assert [line["seen"] for line in lines] == [4, 8, 12, 16, 20, 24]


def test_results_of_fewer_steps_do_not_stay(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    """Hazard: a killed run would be evaluated by the coefficients of an earlier one."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert call(*given.train(run, steps=2)) == 0
    assert {ADAPTER, CURVE, COEFFICIENTS, REPORT} <= {path.name for path in run.iterdir()}
    killed_after(4, given.train(run, steps=5), monkeypatch)
    assert not {ADAPTER, CURVE, COEFFICIENTS, REPORT, SUMMARY} & {
        path.name for path in run.iterdir()
    }
    assert call(*given.train(whole, steps=4)) == 0
    found = []
    for path in (run, whole):
        capfd.readouterr()
        assert call("evaluate", "--run", path) == 0
        found.append(json.loads(capfd.readouterr().out)["loss"])
    assert found[0] == found[1]


def test_metrics_without_their_journal_are_refused(
    given: Given, plain: Run, tmp_path: Path, capfd: Captured
) -> None:
    run = tmp_path / "run"
    shutil.copytree(plain.path, run)
    (run / JOURNAL).unlink()
    assert call(*given.train(run)) == 2
    assert f"holds a run without {JOURNAL}" in capfd.readouterr().err
    assert {CONFIG, METRICS, COEFFICIENTS} <= {path.name for path in run.iterdir()}
