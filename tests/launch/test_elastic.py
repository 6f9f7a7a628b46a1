"""A run that resumes over other ranks and other sharding, restarted by hand and by torchrun; and SIGTERM
under real launchers: all ranks end after the same step, with whole files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from command_line import TIMEOUT, Given, Run, assert_stopped, call, finish, free_port, start
from fault_launchers import ranks_of

from tezo_ds.run.folder import JOURNAL, SNAPSHOTS
from tezo_ds.run.journal import read_journal

pytest_plugins = ("cli_fixtures",)


def deepspeed(ranks: int) -> tuple[object, ...]:
    launcher = (Path(sys.executable).with_name("deepspeed"), "--num_gpus", ranks)
    return (*launcher, "--master_port", free_port(), "--module", "--", "tezo_ds")


def torchrun(ranks: int, *options: object) -> tuple[object, ...]:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks)
    return (*launcher, "--master-port", free_port(), *options, "-m", "--", "tezo_ds")


def until(path: Path, steps: int, process: subprocess.Popen[str]) -> int:
    """Waits until `steps` steps are on disk; returns how many are."""
    deadline, journal = time.monotonic() + TIMEOUT, path / JOURNAL
    while (done := len(read_journal(journal).steps) if journal.exists() else 0) < steps:
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.02)
    return done


@pytest.mark.launches
def test_zero3_on_two_then_fsdp2_on_three_then_one_process(given: Given, tmp_path: Path) -> None:
    """Under deepspeed one rank is sent SIGTERM. Four examples on three ranks are unequal shares, and one
    of these ranks is killed: torchrun restarts all of them. Then torchrun is sent SIGTERM, passes the
    signal on, and ends with an error of its own. Digests show that all ranks had the same state."""
    run, whole = Run(tmp_path / "run"), tmp_path / "whole"
    config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "zero3.json").write_text(json.dumps({**config, "tezo": {}}))
    options = {"method": "tezo-m", "check_every": 1, "queries": 2, "lr": 1e-4, "timeout": 30}
    endless = {**options, "steps": 10**6}
    zero3 = given.train(run.path, deepspeed=tmp_path / "zero3.json", **endless)
    process = start(*deepspeed(2), *zero3)
    until(run.path, 3, process)
    ranks = ranks_of(psutil.Process(process.pid))
    assert set(ranks) == {0, 1}
    ranks[1].terminate()
    ranks[1].terminate()  # changes nothing
    code, out, err = finish(process)
    assert code == 0 and "Zero3 on 2 rank(s)" in out, err
    assert_stopped(run, out)
    first = run.summary["steps"]
    fsdp2 = given.train(run.path, fsdp=True, snapshot_every=5, **endless)
    process = start(*torchrun(3, "--max-restarts", 1), *fsdp2)
    until(run.path, first + 7, process)
    ranks_of(psutil.Process(process.pid))[1].kill()
    killed = until(run.path, 0, process)  # without it the others make no step
    until(run.path, killed + 5, process)
    process.terminate()
    _, out, err = finish(process)
    assert "Fsdp2 on 3 rank(s)" in out, err
    assert_stopped(run, out)
    starts = [int(part.split()[0]) for part in out.split(f"{run.path} goes on after ")[1:]]
    assert len(starts) == 2 and starts[0] == first and killed <= starts[1] < run.summary["steps"]
    assert out.count("after 0 steps:") == 0, "the first evaluation was made before"
    assert len(list((run.path / SNAPSHOTS).glob("step-*.safetensors"))) == 2
    steps = run.summary["steps"] + 2
    assert call(*given.train(run.path, steps=steps, **options)) == 0
    assert call("replay", run.path, "--verify") == 0
    lines = read_journal(run.path / JOURNAL).steps
    assert [line["seen"] for line in lines] == [4 * step for step in range(1, steps + 1)]
    assert run.summary["status"] == "finished"
    assert call(*given.train(whole, steps=steps, **options)) == 0
    for line, alone in zip(lines, read_journal(whole / JOURNAL).steps, strict=True):
        for kappa, expected in zip(line["kappa"], alone["kappa"], strict=True):
            assert abs(kappa - expected) < 5e-3 * max(1, abs(expected))
