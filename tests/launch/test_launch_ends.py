"""The ends of the scripts in launch/: exit codes, signals, restarts; by stand-ins and by real launchers."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from command_line import BLOCK, Given, Run, assert_near, free_port
from launching import FIRST, LAUNCH, PATIENCE, SECOND, end, logs, start, stop

from tezo_ds.run.folder import JOURNAL
from tezo_ds.training.liveness import GO_ON

pytest_plugins = ("cli_fixtures",)


class Fakes:
    """Programs in place of the launchers, as scripts."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.run = folder / "bin", folder / "run"
        self.bin.mkdir()
        (self.bin / "python").symlink_to(sys.executable)
        self.put("sleep", "exec /bin/sleep 0.1")  # however long a script would

    def put(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/bash\nrun={shlex.quote(str(self.run))}\n{body}\n")
        path.chmod(0o755)

    def start(self, script: str, **env: object) -> subprocess.Popen[str]:
        path = f"{self.bin}:{os.environ['PATH']}"
        return start(script, "--output", self.run, PYTHON_BIN_DIR=self.bin, PATH=path, **env)

    def starts(self) -> int:
        """Counts the folders of logs, one a start."""
        return len(list((self.run / "logs").iterdir()))


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path)


ROOT_CAUSE = (
    "echo 'Root Cause (first observed failure):' >&2; echo '  exitcode  : {} (pid: 7)' >&2; exit 1"
)


@pytest.mark.parametrize(
    ("script", "launcher", "body", "expected"),
    [
        ("single_node.sh", "deepspeed", "exit 0", 0),
        ("single_node.sh", "deepspeed", "exit 2", 2),
        ("single_node.sh", "deepspeed", "exit 247", 137),  # Python's sys.exit(-9)
        ("single_node.sh", "deepspeed", "kill -9 $$", 137),
        ("accelerate.sh", "accelerate", ROOT_CAUSE.format(2), 2),
        ("accelerate.sh", "accelerate", ROOT_CAUSE.format(-9), 137),
        ("accelerate.sh", "accelerate", ROOT_CAUSE.format(130), 130),
        ("accelerate.sh", "accelerate", "exit 1", 1),
    ],
)
def test_exit_codes_are_the_ranks(
    fakes: Fakes, script: str, launcher: str, body: str, expected: int
) -> None:
    fakes.put(launcher, body)
    code, out, err = end(fakes.start(script))
    assert code == expected, err
    assert launcher in out and ("output is in" in err) == (code != 0)


def test_elastic_starts_torchrun_again_until_the_run_has_finished(fakes: Fakes) -> None:
    fakes.put(
        "torchrun",
        f"""n=$(ls -d $run/logs/* | wc -l)
        ((n > 1)) || {{ echo 'tezo-ds: error: rank 2 (host b) is silent; look, {GO_ON}'; exit 1; }}
        ((n > 2)) || {{ echo '{{"status": "stopped"}}' >$run/summary.json; exit 0; }}
        ((n > 3)) || exit 1
        echo '{{"status": "finished"}}' >$run/summary.json""",
    )
    code, _, err = end(fakes.start("elastic.sh"))
    assert (code, fakes.starts()) == (0, 4), err
    assert err.count("starting again in 0 s") == 3 and "stopped by another host" in err


def test_elastic_gives_up(fakes: Fakes) -> None:
    """The elastic script gives up after `MAX_RESTARTS` restarts, and at once on an error that no restart
    can help."""
    fakes.put("torchrun", "exit 5")
    code, _, err = end(fakes.start("elastic.sh", MAX_RESTARTS=2))
    assert (code, fakes.starts()) == (5, 3), err
    log = 'while [[ "$1" != --log-dir ]]; do shift; done'
    fakes.put(
        "torchrun", f"{log}; echo 'tezo-ds: error: no such thing' >$2/stderr.log; /bin/sleep 60"
    )
    code, _, err = end(fakes.start("elastic.sh"))
    assert (code, fakes.starts()) == (2, 4), err
    assert "tezo-ds: error: no such thing" in err


RANK = 'trap "echo ended by TERM; touch $run/asked; exit 0" TERM; touch $run/up; while :; do sleep 0.1; done'


def test_sigterm_goes_to_the_ranks(fakes: Fakes) -> None:
    """SIGTERM goes to the ranks: the launcher, asked itself, would exit with 1."""
    fakes.put("rank", RANK)
    fakes.put("deepspeed", f"trap 'exit 1' TERM; RANK=0 {fakes.bin}/rank & wait $!")
    process = fakes.start("single_node.sh")
    until(fakes.run / "up")
    process.terminate()
    code, out, err = end(process)
    assert (code, "ended by TERM" in out) == (0, True), err


@pytest.mark.parametrize(("name", "expected", "said"), [("INT", 130, False), ("TERM", 2, True)])
def test_ctrl_c_is_no_rank_that_gives_no_answer(
    fakes: Fakes, name: str, expected: int, said: bool
) -> None:
    """A rank that ends last takes the first for dead; after a Ctrl-C of ours that is no news."""
    gone = "tezo-ds: error: rank 0 gives no answer"
    fakes.put(
        "rank", f'trap "echo {gone} >&2; exit 2" {name}; touch $run/up; while :; do sleep 0.1; done'
    )
    fakes.put("deepspeed", f"trap : INT TERM; set -m; RANK=0 {fakes.bin}/rank & wait $!; wait $!")
    process = fakes.start("single_node.sh")
    until(fakes.run / "up")
    process.send_signal(getattr(signal, f"SIG{name}"))
    code, _, err = end(process)
    assert code == expected, err
    shown = err.split("output is in")[1].count(gone)  # beside what the ranks wrote at once
    assert shown == said, err


@pytest.mark.parametrize(
    ("steps", "status", "requeued"),
    [(3, "stopped", True), (0, "stopped", False), (3, "finished", False)],
)
def test_slurm_queues_again_where_that_helps(
    fakes: Fakes, steps: int, status: str, requeued: bool
) -> None:
    """A run that makes no step before its time is over would queue for ever."""
    fakes.put("rank", RANK)
    summary = f'echo \'"status": "{status}"\' >$run/summary.json'
    journal = f"for ((i = 0; i < {steps}; i++)); do echo >>$run/journal.jsonl; done"
    fakes.put("srun", f"{journal}; RANK=0 {fakes.bin}/rank; {summary}")
    fakes.put(
        "scontrol",
        f'case "$1" in show) echo "   Command={LAUNCH}/slurm.sbatch --x";; *) echo "$@" >$run/queue;; esac',
    )
    process = fakes.start("slurm.sbatch", SLURM_JOB_ID=77)
    until(fakes.run / "up")
    process.terminate()
    code, _, err = end(process)
    assert code == 0, err
    assert (fakes.run / "queue").exists() == requeued
    if requeued:
        assert (fakes.run / "queue").read_text() == "requeue 77\n"


def until(path: Path, lines: int = 0) -> None:
    """Waits until a file is there, with at least `lines` lines."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists() or path.read_text().count("\n") < lines:
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def assert_halved(run: Run, plain: Run) -> None:
    """Asserts that two ranks shared each batch of `plain` and reached the same coefficients."""
    assert run.config["world_size"] == run.summary["world_size"] == 2
    assert [2 * line["tokens"] for line in run.steps] == [line["tokens"] for line in plain.steps]
    assert_near(run, plain)
    assert run.summary["accuracy_after"] == plain.summary["accuracy_after"]


@pytest.mark.launches
def test_real_launchers(given: Given, plain: Run, tmp_path: Path) -> None:
    """One run has two nodes; another, under accelerate, is ended by Ctrl-C. test_elastic.py has deepspeed
    on one node, and torchrun."""
    config = tmp_path / "zero3.json"
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    block = {**BLOCK, "lr": 0.5}  # the flag wins
    content = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "tezo": block}
    config.write_text(json.dumps(content))
    nodes, other = tmp_path / "nodes", tmp_path / "other"
    port = {"MASTER_PORT": free_port()}
    with ExitStack() as started:

        def begin(script: str, words: list[str], **env: object) -> subprocess.Popen[str]:
            process = start(script, *words[1:], **{"MASTER_PORT": free_port(), **env})
            started.callback(stop, process)
            return process

        pair = [
            begin(
                "no_ssh.sh", given.train(nodes, deepspeed=config), **node, **port, NPROC_PER_NODE=1
            )
            for node in ({**way, "MASTER_ADDR": "127.0.0.1"} for way in (FIRST, SECOND))
        ]
        third = begin("accelerate.sh", given.train(other, steps=40_000, lr=1e-5), NPROC_PER_NODE=1)
        until(other / JOURNAL, 5)
        third.send_signal(signal.SIGINT)
        code, out, err = end(third)
        assert code == 130 and "stopped by SIGINT" in out + err, err
        assert "Fsdp2 on 1 rank(s)" in "".join(logs(other, "stdout.log"))
        for node, process in enumerate(pair):
            code, out, err = end(process)
            assert code == 0 and ("Zero3 on 2 rank(s)" in out) == (node == 0), err
    assert len(logs(nodes, "*_rank0.log")) == len(logs(nodes, "*_rank1.log")) == 1
    assert Run(nodes).summary["status"] == "finished"
    assert Run(nodes).config["deepspeed"]["zero_optimization"]["stage"] == 3
    assert Run(nodes).config["tezo"]["lr"] == BLOCK["lr"]
    assert_halved(Run(nodes), plain)
