"""A run that goes on over other ranks and other sharding, started again by hand and by torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from command_line import TIMEOUT, Given, Run, call, finish, free_port, start

from tezo_ds.journal import read_journal
from tezo_ds.runfolder import JOURNAL, SNAPSHOTS

pytest_plugins = ("cli_fixtures",)


def torchrun(ranks: int, *options: object) -> tuple[object, ...]:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks)
    return (*launcher, "--master-port", free_port(), *options, "-m", "--", "tezo_ds")


def steps_in(path: Path) -> int:
    return len(read_journal(path / JOURNAL).steps) if (path / JOURNAL).exists() else 0


def worker(launcher: int, rank: int) -> psutil.Process:
    """The process of a rank."""
    for process in psutil.Process(launcher).children(recursive=True):
        if process.environ().get("RANK") == str(rank) and "tezo_ds" in " ".join(process.cmdline()):
            return process
    raise AssertionError(f"no rank {rank}")


def until(path: Path, steps: int, process: subprocess.Popen[str]) -> None:
    """Waits until so many steps are on disk."""
    deadline = time.monotonic() + TIMEOUT
    while steps_in(path) < steps:
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.02)


def test_zero3_on_two_then_fsdp2_on_three_then_one_process(given: Given, tmp_path: Path) -> None:
    """Four examples on three ranks are no equal shares, and one of these is killed: torchrun's agent
    starts them again, without a hand. Digests show that all had the same state."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "zero3.json").write_text(json.dumps({**config, "tezo": {}}))
    options = {"method": "tezo-m", "check_every": 1, "queries": 2, "lr": 1e-4, "timeout": 30}
    deepspeed = (Path(sys.executable).with_name("deepspeed"), "--num_gpus", 2, "--master_port")
    zero3 = given.train(run, steps=3, deepspeed=tmp_path / "zero3.json", **options)
    code, out, err = finish(start(*deepspeed, free_port(), "--module", "tezo_ds", *zero3))
    assert code == 0 and "Zero3 on 2 rank(s)" in out, err
    fsdp2 = given.train(run, steps=24, fsdp=True, snapshot_every=5, **options)
    process = start(*torchrun(3, "--max-restarts", 1), *fsdp2)
    until(run, 8, process)
    os.kill(worker(process.pid, 1).pid, signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0 and "Fsdp2 on 3 rank(s)" in out, err
    starts = [int(part.split()[0]) for part in out.split(f"{run} goes on after ")[1:]]
    assert len(starts) == 2 and starts[0] == 3 and 8 <= starts[1] < 24
    assert out.count("after 0 steps:") == 0, "the first evaluation was made before"
    assert len(list((run / SNAPSHOTS).glob("step-*.safetensors"))) == 2
    assert call(*given.train(run, steps=26, **options)) == 0
    assert call("replay", run, "--verify") == 0
    lines = read_journal(run / JOURNAL).steps
    assert [line["seen"] for line in lines] == [4 * step for step in range(1, 27)]
    assert Run(run).summary["status"] == "finished"
    assert call(*given.train(whole, steps=26, **options)) == 0
    for line, alone in zip(lines, read_journal(whole / JOURNAL).steps, strict=True):
        for kappa, expected in zip(line["kappa"], alone["kappa"], strict=True):
            assert abs(kappa - expected) < 5e-3 * max(1, abs(expected))
