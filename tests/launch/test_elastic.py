"""A run that resumes over other ranks and other sharding, restarted by hand and by torchrun; and SIGTERM
under real launchers and scripts: all ranks end after the same step, with whole files."""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from command_line import TIMEOUT, Given, Run, assert_found_again, assert_stopped, call, free_port
from fault_launchers import ranks_of
from launching import end, logs, start, stop
from only_ours import stray

from tezo_ds.run.folder import JOURNAL, SNAPSHOTS
from tezo_ds.run.journal import read_journal

pytest_plugins = ("cli_fixtures",)


def until(path: Path, steps: int, process: subprocess.Popen[str]) -> int:
    """Waits until `steps` steps are on disk; returns how many are."""
    deadline, journal = time.monotonic() + TIMEOUT, path / JOURNAL
    while (done := len(read_journal(journal).steps) if journal.exists() else 0) < steps:
        assert process.poll() is None and time.monotonic() < deadline, end(process)
        time.sleep(0.02)
    return done


@pytest.mark.launches
def test_zero3_on_two_then_fsdp2_on_three_then_one_process(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under deepspeed one rank is sent SIGTERM, in a folder that held logs alone. Four examples on three
    ranks are unequal shares, and one of these ranks is killed: torchrun restarts all of them. Then the
    script is sent SIGTERM, and tells the ranks. Digests show that all ranks had the same state."""
    run, whole = Run(tmp_path / "run"), tmp_path / "whole"
    (run.path / "logs" / "old").mkdir(parents=True)
    config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (tmp_path / "zero3.json").write_text(json.dumps({**config, "tezo": {}}))
    options = {"method": "tezo-m", "check_every": 1, "queries": 2, "lr": 1e-4, "timeout": 30}
    endless = {**options, "steps": 10**6}
    with ExitStack() as started:

        def begin(script: str, words: list[str], **env: object) -> subprocess.Popen[str]:
            process = start(script, *words[1:], MASTER_PORT=free_port(), **env)
            started.callback(stop, process)
            return process

        zero3 = given.train(run.path, deepspeed=tmp_path / "zero3.json", **endless)
        process = begin("single_node.sh", zero3)
        until(run.path, 3, process)
        ranks = ranks_of(psutil.Process(process.pid))
        assert set(ranks) == {0, 1}
        ranks[1].terminate()
        ranks[1].terminate()  # changes nothing
        code, out, err = end(process)
        assert code == 0 and "Zero3 on 2 rank(s)" in out, err
        assert_stopped(run, out)
        first = run.summary["steps"]
        fsdp2 = given.train(run.path, fsdp=True, snapshot_every=5, **endless)
        process = begin("elastic.sh", fsdp2, NPROC_PER_NODE=3)
        until(run.path, first + 7, process)
        ranks_of(psutil.Process(process.pid))[1].kill()
        killed = until(run.path, 0, process)  # without it the others make no step
        until(run.path, killed + 5, process)
        process.terminate()
        code, out, err = end(process)
    assert code == 0 and "Fsdp2 on 3 rank(s)" in out, err
    assert_stopped(run, out)
    # All that ranks of deepspeed's wrote, from their starts on.
    assert [stray(said) for said in logs(run.path, "*_rank?.log")] == [[], []]
    assert len(logs(run.path, "*_rank0.log")) == 1 and len(logs(run.path, "stdout.log")) == 2 * 3
    assert run.config["settings"]["fsdp"]
    assert run.config["weights_dtype"] == run.config["factors_dtype"] == "float32"
    starts = [int(part.split()[0]) for part in out.split(f"{run.path} goes on after ")[1:]]
    assert len(starts) == 2 and starts[0] == first and killed <= starts[1] < run.summary["steps"]
    assert out.count("after 0 steps:") == 0, "the first evaluation was made before"
    assert len(list((run.path / SNAPSHOTS).glob("step-*.safetensors"))) == 2
    steps = run.summary["steps"] + 2
    assert call(*given.train(run.path, steps=steps, **options)) == 0
    assert call("replay", run.path, "--verify") == 0
    assert_found_again(run, capsys, 1e-6)
    lines = read_journal(run.path / JOURNAL).steps
    assert [line["seen"] for line in lines] == [4 * step for step in range(1, steps + 1)]
    assert run.summary["status"] == "finished"
    assert call(*given.train(whole, steps=steps, **options)) == 0
    for line, alone in zip(lines, read_journal(whole / JOURNAL).steps, strict=True):
        for kappa, expected in zip(line["kappa"], alone["kappa"], strict=True):
            assert abs(kappa - expected) < 5e-3 * max(1, abs(expected))
