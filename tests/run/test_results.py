"""The result of every method, rebuilt from its run folder by evaluate and by export."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from cli_fixtures import make_plain
from command_line import Given, Run, call
from safetensors.torch import load_file

from tezo_ds.directions.lowrank import FixedFactors
from tezo_ds.engine.report import StepReport
from tezo_ds.run.folder import ADAPTER, COEFFICIENTS, JOURNAL, MODEL, SUMMARY, RunFolder
from tezo_ds.training import loop

pytest_plugins = ("cli_fixtures",)
pytestmark = pytest.mark.usefixtures("other_kernels")

MEZO: dict[str, Any] = {"method": "mezo", "rank": None, "lr": 2e-4, "dtype": "bfloat16"}
LOZO: dict[str, Any] = {"method": "lozo", "rank": 2, "nu": 2, "lr": 2e-4}
ADAM: dict[str, Any] = {"method": "tezo-adam", "lr": 2e-3}
SAID = "replaying {} steps of journal.jsonl\n"

Captured = pytest.CaptureFixture[str]


def trained(given: Given, path: Path, **options: Any) -> Run:
    assert call(*given.train(path, **options)) == 0
    return Run(path)


def evaluated(run: Path, capfd: Captured, *switches: object) -> tuple[float | None, str]:
    """Evaluates a run; returns the loss, and what stderr says besides."""
    capfd.readouterr()
    assert call("evaluate", "--run", run, *switches) == 0
    out, err = capfd.readouterr()
    return json.loads(out)["loss"], err


def refused(run: Path, capfd: Captured, *telling: str) -> None:
    capfd.readouterr()
    assert call("evaluate", "--run", run) == 2
    err = capfd.readouterr().err
    assert err.startswith("tezo-ds: error: ") and err.count("\n") == 1
    for words in telling:
        assert words in err


@pytest.fixture(scope="module")
def plain(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trains a plain run under the kernels of this module."""
    return make_plain(given, tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def lozo(given: Given, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(given, tmp_path_factory.mktemp("lozo") / "run", **LOZO)


def copy_of(run: Run, path: Path) -> Path:
    """Copies a run as if it had been interrupted or killed: without its model."""
    shutil.copytree(run.path, path, ignore=shutil.ignore_patterns(MODEL))
    return path


def test_a_run_that_writes_weights_leaves_its_model(
    given: Given, lozo: Run, tmp_path: Path, capfd: Captured
) -> None:
    found = {path.name for path in lozo.path.iterdir()}
    assert MODEL in found and not found & {COEFFICIENTS, ADAPTER}
    after = lozo.summary["test_loss_after"]
    assert abs(after - lozo.summary["test_loss_before"]) > 0.01
    loss, said = evaluated(lozo.path, capfd)
    assert loss == pytest.approx(after, rel=1e-6) and said == ""
    path = copy_of(lozo, tmp_path / "run")
    loss, said = evaluated(path, capfd)
    assert loss == after and said == SAID.format(6)
    loss, said = evaluated(lozo.path, capfd, "--model", given.model)  # the result on that model
    assert loss == after and said == SAID.format(6)
    (path / MODEL).mkdir()  # an export that was killed has no index
    assert evaluated(path, capfd) == (after, SAID.format(6))
    exports = []
    for source in (lozo.path, path):
        folder = tmp_path / f"exported {len(exports)}"
        assert call("export", "--run", source, "--merged", folder) == 0
        files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
        exports.append({name: tensor for file in files for name, tensor in file.items()})
    for name, tensor in exports[0].items():
        assert bool((tensor - exports[1][name]).abs().max() < 1e-6)
    assert evaluated(path, capfd, "--dtype", "bfloat16")[0] != after
    assert call("export", "--run", path, "--adapter", tmp_path / "adapter") == 2
    err = capfd.readouterr().err
    assert "error: what lozo learns is no low-rank change" in err and err.count("\n") == 1


@pytest.mark.parametrize("options", [LOZO, MEZO, ADAM], ids=lambda options: options["method"])
def test_a_run_that_was_stopped_is_replayed(
    options: dict[str, Any], given: Given, tmp_path: Path, hearing_again: None,
    monkeypatch: pytest.MonkeyPatch, capfd: Captured,
) -> None:  # fmt: skip
    whole = trained(given, tmp_path / "whole", steps=3, save_model=False, **options)
    assert not (whole.path / MODEL).exists()
    assert "in journal.jsonl, which evaluate and export replay" in capfd.readouterr().out
    log_step = RunFolder.log_step

    def log_and_stop(folder: RunFolder, report: StepReport, *more: Any) -> None:
        log_step(folder, report, *more)
        if report.step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log_step", log_and_stop)
        assert call(*given.train(tmp_path / "run", **options)) == 130
    said = "evaluate and export replay the steps so far from journal.jsonl in the run folder"
    assert f"tezo-ds: stopped by SIGINT; {said}, and the same command" in capfd.readouterr().err
    run = Run(tmp_path / "run")
    assert run.summary["status"] == "interrupted" and run.summary["steps"] == 3
    assert not (run.path / MODEL).exists()
    loss = whole.summary["test_loss_after"]
    assert evaluated(run.path, capfd) == (loss, SAID.format(3))
    assert loss != whole.summary["test_loss_before"]


def test_a_killed_run_of_coefficients_is_replayed(
    plain: Run, tmp_path: Path, capfd: Captured
) -> None:
    path = copy_of(plain, tmp_path / "run")
    for name in (COEFFICIENTS, SUMMARY):
        (path / name).unlink()
    found = evaluated(path, capfd)
    assert found == (plain.summary["test_loss_after"], SAID.format(len(plain.steps)))


def test_torn_lines_and_holes(given: Given, lozo: Run, tmp_path: Path, capfd: Captured) -> None:
    path = copy_of(lozo, tmp_path / "run")
    first, *lines = (path / JOURNAL).read_text().splitlines(keepends=True)

    def write(*kept: str) -> None:
        (path / JOURNAL).write_text("".join([first, *kept]))

    write(*lines[:5], lines[5][:-9])
    refused(path, capfd, f"{JOURNAL}: has 5 whole steps, and the run had 6")
    (path / SUMMARY).unlink()  # killed while it wrote that line
    five = trained(given, tmp_path / "five", **LOZO, steps=5, save_model=False)
    expected = five.summary["test_loss_after"], SAID.format(5)
    assert evaluated(path, capfd) == expected
    write(*lines[:2], *lines[3:])
    refused(path, capfd, "line 4 is damaged", "from a copy")
    write(*lines[:2], lines[2].replace('"lr":0', '"lr":1'), *lines[3:])
    refused(path, capfd, "line 4 is damaged (does not have its checksum)")
    (path / JOURNAL).unlink()
    refused(path, capfd, f"{COEFFICIENTS} does not exist, and no {JOURNAL} either")


def test_a_signal_within_a_refresh(
    given: Given, tmp_path: Path, hearing_again: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard: a of the period that ends is among the ended ones and still the current one."""
    options = {"refresh_every": 2, "steps": 3}
    whole = trained(given, tmp_path / "whole", **options).coefficients
    advance = FixedFactors.advance

    def advance_stopped(factors: FixedFactors) -> None:
        signal.raise_signal(signal.SIGINT)
        advance(factors)

    monkeypatch.setattr(FixedFactors, "advance", advance_stopped)
    assert call(*given.train(tmp_path / "run", refresh_every=2)) == 130
    found = Run(tmp_path / "run")
    assert len(found.steps) == 3
    assert all(bool((part == whole[name]).all()) for name, part in found.coefficients.items())
    state = property(lambda training: (training._engine.step_index, 0))
    monkeypatch.setattr(loop._Training, "_state", state)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert call(*given.train(tmp_path / "unhandled", refresh_every=2)) == 130
    for a in Run(tmp_path / "unhandled").coefficients.values():
        assert bool((a[0] == a[1]).all() and a.any())


def test_ranks_and_periods_of_a_run_are_those_of_its_evaluation(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    options = {"rank": "auto", "rank_threshold": 0.6, "refresh_every": 2}
    run = trained(given, tmp_path / "run", **options, save_model=True)
    out = capfd.readouterr().out
    ranks = run.config["ranks"]
    low, high = min(ranks.values()), max(ranks.values())
    assert low < high and f"auto: {low}-{high}, median " in out and "every 2 steps" in out
    assert f"{run.path / MODEL}\n" in out  # not cut to the width
    for name, part in run.coefficients.items():
        assert part.shape == (3, ranks[name])
    monkeypatch.setattr("tezo_ds.engine.selection.auto_ranks", None)  # not to be called again
    assert evaluated(run.path, capfd) == (run.summary["test_loss_after"], "")
    adapter = tmp_path / "adapter"
    assert call("export", "--run", run.path, "--adapter", adapter) == 0
    ours, theirs = (
        load_file(p / "adapter_model.safetensors") for p in (adapter, run.path / ADAPTER)
    )
    assert all(bool((tensor == ours[name]).all()) for name, tensor in theirs.items())
    config = run.config
    for ranks, telling in ((None, '"ranks" of a run of rank or include auto is missing'),
                           ({"other": 3}, "ranks and model differ in 16 parameters")):  # fmt: skip
        (run.path / "config.json").write_text(json.dumps({**config, "ranks": ranks}))
        refused(run.path, capfd, telling)


def test_the_summary_says_what_the_method_does(
    given: Given, tmp_path: Path, capfd: Captured
) -> None:
    def said(name: str, **options: Any) -> list[str]:
        trained(given, tmp_path / name, steps=1, save_model=False, **options)
        return [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]

    lines = said("lozo", **LOZO, train_vectors=True, probe="inplace", restore="copy")
    for line in ("trains 15 matrices, 5 vectors, 15,422 weights", "ν 2 steps until V is new",
                 "restore copy", "rank 2", "method lozo, inplace probe, Q = 1"):  # fmt: skip
        assert line in lines
    lines = said("mezo", **{**MEZO, "method": "mezo-adam"})
    assert "restore subtract" in lines
    assert any(line.endswith("bytes, and two moments of each weight on its rank") for line in lines)
    warning = "warning: 16-bit weights train in place with restore: subtract"
    assert any(line.startswith(warning) and line.endswith("restore: copy") for line in lines)
    lines = said("exact", **{**MEZO, "dtype": "float32"})
    assert "restore subtract" in lines and not any(warning in line for line in lines)
    assert "state 60 coefficients, 480 bytes" in said("tezo")


def test_a_run_that_fails_can_be_replayed_up_to_there(
    given: Given, tmp_path: Path, capfd: Captured
) -> None:
    options = {**LOZO, "lr": 1e30, "probe": "inplace"}
    assert call(*given.train(tmp_path / "run", **options)) == 2
    said = "failed; evaluate and export replay the steps so far from journal.jsonl"
    assert said in capfd.readouterr().out
    assert {path.name for path in (tmp_path / "run").iterdir()}.isdisjoint({MODEL, COEFFICIENTS})
    assert evaluated(tmp_path / "run", capfd)[1] == SAID.format(1)
