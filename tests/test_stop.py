"""SIGTERM lets the step finish: under real launchers all ranks end after the same one, with whole files."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import TIMEOUT, Given, Run, call, finish, free_port, start

from tezo_ds.interrupts import Interrupted, turned_into_exceptions
from tezo_ds.runfolder import ADAPTER, COEFFICIENTS, METRICS, RunFolder

pytest_plugins = ("cli_fixtures",)

LONG = {"steps": 10**6, "lr": 1e-7}


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Processes that run our module, by rank."""
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        words, rank = process.cmdline(), process.environ().get("RANK")
        if rank is not None and "tezo_ds" in words and "launch" not in " ".join(words):
            found[int(rank)] = process
    return found


def wait_for_steps(run: Run, launcher: subprocess.Popen[str], steps: int = 10) -> None:
    deadline, metrics = time.monotonic() + TIMEOUT, run.path / METRICS
    while not (metrics.exists() and metrics.read_text().count("\n") > steps):
        assert launcher.poll() is None, finish(launcher)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_stopped(run: Run, out: str) -> None:
    """Everything is there as of one step, but what follows the last step of a run."""
    steps = run.summary["steps"]
    assert run.summary["status"] == "stopped"
    assert f"stopped by SIGTERM after step {steps}; the same command goes on from there" in out
    assert [line["step"] for line in run.steps] == list(range(steps))
    assert "accuracy_after" not in run.summary
    assert bool(run.coefficients) and (run.path / ADAPTER).is_dir()


def test_a_signal_to_one_rank_under_deepspeed(given: Given, tmp_path: Path) -> None:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": zero, "tezo": {}}))
    run, launcher = Run(tmp_path / "run"), Path(sys.executable).with_name("deepspeed")
    options = ("--num_gpus", 2, "--master_port", free_port(), "--module", "tezo_ds")
    arguments = given.train(run.path, deepspeed=tmp_path / "zero3.json", **LONG)
    process = start(launcher, *options, *arguments)
    wait_for_steps(run, process)
    ranks = ranks_of(process)
    assert set(ranks) == {0, 1}
    ranks[1].send_signal(signal.SIGTERM)
    ranks[1].send_signal(signal.SIGTERM)  # changes nothing
    code, out, err = finish(process)
    assert code == 0, err
    assert_stopped(run, out)


def test_a_signal_to_torchrun(given: Given, tmp_path: Path) -> None:
    """It passes the signal on, and ends with an error of its own once its ranks have ended."""
    run = Run(tmp_path / "run")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2)
    options = ("--master-port", free_port(), "-m", "tezo_ds")
    process = start(*launcher, *options, *given.train(run.path, **LONG))
    wait_for_steps(run, process)
    process.send_signal(signal.SIGTERM)
    _, out, _ = finish(process)
    assert_stopped(run, out)


def test_one_process_stops_and_leaves_the_last_evaluation(
    given: Given, tmp_path: Path, hearing_again: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    log_step = RunFolder.log_step

    def log_and_signal(folder: RunFolder, report: Any, *more: Any) -> None:
        log_step(folder, report, *more)
        if report.step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "log_step", log_and_signal)
    assert call(*given.train(tmp_path / "run", save_model=True)) == 0
    run = Run(tmp_path / "run")
    assert run.summary["steps"] == 4  # the next step tells all ranks
    assert_stopped(run, capsys.readouterr().out)
    assert not (run.path / "model").exists() and (run.path / COEFFICIENTS).exists()


def test_term_calls_once_and_int_still_raises(hearing_again: None) -> None:
    calls: list[str] = []
    with (
        pytest.raises(Interrupted, match="SIGINT"),
        turned_into_exceptions(on_term=lambda: calls.append("term")),
    ):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert calls == ["term"]
        signal.raise_signal(signal.SIGINT)
    assert calls == ["term"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # deaf while it writes


def test_term_raises_where_nothing_is_to_be_called(hearing_again: None) -> None:
    with pytest.raises(Interrupted, match="SIGTERM"), turned_into_exceptions():
        signal.raise_signal(signal.SIGTERM)


def test_a_rank_that_stops_because_others_were_told_is_deaf_too(hearing_again: None) -> None:
    for ending in (False, True):
        with turned_into_exceptions(ending=lambda ending=ending: ending):
            pass
        assert (signal.getsignal(signal.SIGTERM) == signal.SIG_IGN) == ending
