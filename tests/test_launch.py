"""The scripts in launch/: what they would run, how they end, and what stays of launchers' own ways."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import TIMEOUT, Given, Run, call, free_port

from tezo_ds.liveness import GO_ON
from tezo_ds.runfolder import JOURNAL

pytest_plugins = ("cli_fixtures",)

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
PATIENCE = 4 * TIMEOUT  # as several launchers start at once
SCRIPTS = (
    "single_node.sh",
    "hostfile.sh",
    "no_ssh.sh",
    "elastic.sh",
    "accelerate.sh",
    "slurm.sbatch",
)
READ = {
    "HOSTFILE", "NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "MAX_RESTARTS",
    "RDZV_CONF", "CUDA_VISIBLE_DEVICES", "DS_ENV_FILE", "RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_JOB_ID",
}  # fmt: skip


def start(script: str, *flags: object, **env: object) -> subprocess.Popen[str]:
    """A script, as a user without any of its variables starts it."""
    kept = {name: value for name, value in os.environ.items() if name not in READ}
    mine = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RESTART_PAUSE": "0", **env}
    return subprocess.Popen(
        ["bash", str(LAUNCH / script), *map(str, flags)],
        env={**kept, **{name: str(value) for name, value in mine.items()}},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        stop(process)
    return process.returncode, out, err


def stop(process: subprocess.Popen[str]) -> None:
    """Ends a script with all that it started: first as a cluster does, then as one in a hurry."""
    for _ in range(2):
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
    process.kill()


def dry(script: str, *flags: object, **env: object) -> list[str]:
    """The words of what a script would run, without the variables before them."""
    code, out, err = end(start(script, "--dry-run", *flags, **env))
    assert (code, err) == (0, "")
    words = shlex.split(out.splitlines()[-1])
    return words[next(i for i, word in enumerate(words) if not re.match(r"\w+=", word)) :]


FIRST, SECOND = ({"NNODES": 2, "NODE_RANK": rank, "MASTER_ADDR": "10.0.0.1"} for rank in (0, 1))
FOUR = {"NNODES": "2:4", "MASTER_ADDR": "10.0.0.1"}
YAML = LAUNCH.parent / "ds_configs" / "accelerate_fsdp2.yaml"


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("# ours\nnode1 slots=2\nnode2 slots=2\n\n")
    return path


@pytest.mark.parametrize(
    ("script", "env", "telling"),
    [
        ("single_node.sh", {}, "--master_port 29500 --log_level error --num_gpus 2"),
        ("single_node.sh", {"NPROC_PER_NODE": 3}, "--num_gpus 3"),
        ("single_node.sh", {"MASTER_PORT": 7}, "--master_port 7"),
        ("hostfile.sh", {}, "--master_port 29500 --num_nodes -1 --num_gpus -1"),
        ("hostfile.sh", FIRST, "--num_nodes 2 --num_gpus -1 --master_addr 10.0.0.1"),
        ("no_ssh.sh", SECOND, "--node_rank 1 --log_level error --master_addr 10.0.0.1"),
        ("elastic.sh", {}, "--nnodes 1:1 --nproc-per-node 2"),
        ("elastic.sh", {**FOUR, "RDZV_CONF": "join_timeout=9"}, "--rdzv-conf join_timeout=9"),
        ("elastic.sh", FOUR, "--rdzv-endpoint 10.0.0.1:29500"),
        ("accelerate.sh", {}, f"launch --config_file {YAML} --num_processes 2"),
        ("accelerate.sh", SECOND, "--num_processes 4 --num_machines 2 --machine_rank 1"),
        ("slurm.sbatch", {}, "srun --ntasks-per-node=1 --kill-on-bad-exit=1"),
        ("slurm.sbatch", {"SLURM_NNODES": 4, "NPROC_PER_NODE": 8}, "--nnodes 4 --nproc-per-node 8"),
    ],
)  # fmt: skip
def test_dry_run_prints_the_command_and_touches_nothing(
    script: str, env: dict[str, Any], telling: str, hosts: Path, tmp_path: Path
) -> None:
    run = tmp_path / "a run"
    words = dry(script, "--output", run, "--steps", 3, **{"HOSTFILE": hosts, **env})
    assert telling in " ".join(words)
    if script == "hostfile.sh":
        assert "train --output $'" in " ".join(words) and words[-2:] == ["--steps", "3"]
    else:
        assert words[-6:] == ["tezo_ds", "train", "--output", str(run), "--steps", "3"]
    assert any(word.startswith(f"{run}/logs/") for word in words) or script == "hostfile.sh"
    assert not run.exists()


@pytest.mark.parametrize(
    ("script", "env", "telling"),
    [
        ("single_node.sh", {"PYTHON_BIN_DIR": "/no"}, "no /no/python; run launch/setup.sh"),
        ("hostfile.sh", {}, "no hostfile /job/hostfile; set HOSTFILE to"),
        ("hostfile.sh", {"HOSTFILE": "/dev/null"}, "no hostfile /dev/null"),
        ("hostfile.sh", {"HOSTFILE": YAML}, "names no host; write lines such as"),
        ("hostfile.sh", {"PATH": ""}, "pdsh is missing; install it"),
        ("no_ssh.sh", {"NNODES": 2}, "NODE_RANK is not set; set it"),
        ("no_ssh.sh", {**SECOND, "NODE_RANK": 2}, "NODE_RANK is 2; set it from 0 to 1"),
        ("no_ssh.sh", {**SECOND, "NNODES": "two"}, "NNODES is 'two'; set it to a whole number"),
        ("elastic.sh", {"NNODES": 2}, "NNODES is '2'; set it to MIN:MAX"),
        ("elastic.sh", {"NNODES": "3:2"}, "NNODES is '3:2'; set it to MIN:MAX"),
        ("elastic.sh", {"MAX_RESTARTS": "many"}, "MAX_RESTARTS is 'many'; set it to a whole number"),
        ("accelerate.sh", {"NNODES": 2}, "MASTER_ADDR is not set"),
        ("accelerate.sh", {"ACCELERATE_CONFIG": "x.yaml"}, "no x.yaml; set ACCELERATE_CONFIG"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    script: str, env: dict[str, Any], telling: str, tmp_path: Path
) -> None:
    if "PATH" in env:  # all but pdsh
        for name in ("bash", "dirname", "basename", "date", "hostname", "awk", "head", "paste"):
            (tmp_path / name).symlink_to(f"/usr/bin/{name}")
        (tmp_path / "hosts").write_text("h slots=1\n")
        env = {"PATH": tmp_path, "HOSTFILE": tmp_path / "hosts"}
    code, out, err = end(start(script, "--output", tmp_path / "run", **env))
    assert (code, out) == (2, "")
    assert err.startswith(f"{script}: error: ") and err.count("\n") == 1 and telling in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_one_screen_and_say_what_they_are_for(script: str) -> None:
    lines = (LAUNCH / script).read_text().splitlines()
    code, _, err = end(start(script, "--steps", 3))
    assert (code, err.count("\n")) == (2, 1) and "error: --output is missing; name a folder" in err
    code, out, err = end(start(script, "--help"))
    assert (code, err) == (0, "")
    assert script in out and "--dry-run" in out and "#" not in out.replace("# ", "")
    assert len(lines) - len(out.splitlines()) <= 50
    assert subprocess.run(["bash", "-n", LAUNCH / script], check=False).returncode == 0


def remote(command: list[str]) -> list[str]:
    """What the ranks of another host get as flags: what deepspeed makes of them, pdsh and a shell."""
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import parse_args

    words, _, _ = PDSHRunner(parse_args(command[1:]), "").get_cmd({}, {"host": [0]})
    line = " ".join(words[words.index("tezo_ds") :]).replace("%n", "0").replace("%h", "host")
    shown = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=False
    )
    return shown.stdout.split("\0")[:-1]


def test_words_survive_pdsh(hosts: Path) -> None:
    """deepspeed quotes only words with spaces, and in those neither $ nor a backslash; pdsh reads %."""
    odd = ['{text} It "was" $HOME, isn\'t it', '{"a":"b c"}', "100%h `x` \\n", "é;&", "*", ""]
    flags = [word for value in odd for word in ("--template", value)]
    sent = dry("hostfile.sh", "--output", "r", *flags, HOSTFILE=hosts)
    assert remote(sent)[1:] == ["train", "--output", "r", *flags]
    plain = [*sent[: sent.index("train")], "train", "--output", "r", *flags]
    assert remote(plain)[1:] != ["train", "--output", "r", *flags]


def test_variables_travel_but_not_tokens(hosts: Path, tmp_path: Path) -> None:
    env = {
        "GLOO_SOCKET_IFNAME": "eth7",
        "NCCL_DEBUG": "INFO",
        "HF_TOKEN": "secret",
        "CUDA_VISIBLE_DEVICES": "1",
    }
    (tmp_path / ".deepspeed_env").write_text("MINE=1\n")
    code, out, _ = end(
        start("hostfile.sh", "--dry-run", "--output", "r", HOSTFILE=hosts, HOME=tmp_path, **env)
    )
    words = shlex.split(out.splitlines()[0])
    assert code == 0 and {"GLOO_SOCKET_IFNAME=eth7", "NCCL_DEBUG=INFO", "MINE=1"} <= set(words)
    assert "secret" not in out


class Fakes:
    """Programs in place of the launchers, as scripts."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.run = folder / "bin", folder / "run"
        self.bin.mkdir()
        (self.bin / "python").symlink_to(sys.executable)

    def put(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/bash\nrun={shlex.quote(str(self.run))}\n{body}\n")
        path.chmod(0o755)

    def start(self, script: str, **env: object) -> subprocess.Popen[str]:
        path = f"{self.bin}:{os.environ['PATH']}"
        return start(script, "--output", self.run, PYTHON_BIN_DIR=self.bin, PATH=path, **env)

    def starts(self) -> int:
        """Folders of logs."""
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
    """After so many restarts; and at once, in the midst of torchrun's own, where none can help."""
    fakes.put("torchrun", "exit 5")
    code, _, err = end(fakes.start("elastic.sh", MAX_RESTARTS=2))
    assert (code, fakes.starts()) == (5, 3), err
    log = 'while [[ "$1" != --log-dir ]]; do shift; done'
    fakes.put("torchrun", f"{log}; echo 'tezo-ds: error: no such thing' >$2/stderr.log; sleep 60")
    code, _, err = end(fakes.start("elastic.sh"))
    assert (code, fakes.starts()) == (2, 4), err
    assert "tezo-ds: error: no such thing" in err


RANK = 'trap "echo ended by TERM; touch $run/asked; exit 0" TERM; touch $run/up; while :; do sleep 0.1; done'


def test_sigterm_goes_to_the_ranks(fakes: Fakes) -> None:
    """The launcher, asked itself, would exit with 1."""
    fakes.put("rank", RANK)
    fakes.put("deepspeed", f"trap 'exit 1' TERM; RANK=0 {fakes.bin}/rank & wait $!")
    process = fakes.start("single_node.sh")
    until(fakes.run / "up")
    process.terminate()
    code, out, err = end(process)
    assert (code, "ended by TERM" in out) == (0, True), err


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
    """Waits until a file is there, with so many lines."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists() or path.read_text().count("\n") < lines:
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def logs(run: Path, pattern: str) -> list[str]:
    """Of ranks, in the order of their names."""
    return [path.read_text() for path in sorted((run / "logs").rglob(pattern))]


def test_real_launchers(given: Given, tmp_path: Path) -> None:
    """A run is stopped under deepspeed and goes on under torchrun, in a folder that held logs alone; one
    of two nodes; and one under accelerate, that Ctrl-C ends."""
    config = tmp_path / "zero3.json"
    config.write_text('{"zero_optimization": {"stage": 3}, "tezo": {}}')
    run, nodes, other = (tmp_path / name for name in ("run", "nodes", "other"))
    (run / "logs" / "old").mkdir(parents=True)
    port = {"MASTER_PORT": free_port()}
    with ExitStack() as started:

        def begin(script: str, words: list[str], **env: object) -> subprocess.Popen[str]:
            process = start(script, *words[1:], **{"MASTER_PORT": free_port(), **env})
            started.callback(stop, process)
            return process

        first = begin("single_node.sh", given.train(run, steps=4000, lr=1e-5, deepspeed=config))
        pair = [
            begin(
                "no_ssh.sh", given.train(nodes, deepspeed=config), **node, **port, NPROC_PER_NODE=1
            )
            for node in ({**way, "MASTER_ADDR": "127.0.0.1"} for way in (FIRST, SECOND))
        ]
        third = begin("accelerate.sh", given.train(other, steps=4000, lr=1e-5), NPROC_PER_NODE=1)
        until(run / JOURNAL, 5)
        first.send_signal(signal.SIGTERM)
        code, out, err = end(first)
        assert code == 0 and "stopped by SIGTERM" in out and "Zero3 on 2 rank(s)" in out, err
        done = Run(run).summary["steps"]
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
        code, out, err = end(
            begin("elastic.sh", given.train(run, steps=done + 3, lr=1e-5, fsdp=True))
        )
        assert code == 0 and f"goes on after {done} steps" in out, err
    assert len(logs(run, "*_rank0.log")) == 1 and len(logs(run, "stdout.log")) == 2
    alone = tmp_path / "alone"
    assert call(*given.train(alone, steps=done + 3, lr=1e-5)) == 0
    for name, value in Run(alone).coefficients.items():
        assert Run(run).coefficients[name].allclose(value, rtol=1e-3, atol=1e-5)
