"""Calls that start and end the scripts in launch/ as a user does."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from contextlib import suppress
from pathlib import Path

from command_line import TIMEOUT

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
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


FIRST, SECOND = ({"NNODES": 2, "NODE_RANK": rank, "MASTER_ADDR": "10.0.0.1"} for rank in (0, 1))


def start(script: str, *flags: object, **env: object) -> subprocess.Popen[str]:
    """Starts a script as a user does, without any of its variables in the environment."""
    kept = {name: value for name, value in os.environ.items() if name not in READ}
    mine = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RESTART_PAUSE": "0", **env}
    return subprocess.Popen(
        ["bash", str(LAUNCH / script), *map(str, flags)],
        env={**kept, **{name: str(value) for name, value in mine.items()}},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Waits for a process and returns its exit code, stdout and stderr."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        stop(process)
    return process.returncode, out, err


def stop(process: subprocess.Popen[str]) -> None:
    """Ends a script with all that it started: SIGTERM as a cluster sends it, a second SIGTERM, and
    SIGKILL."""
    for _ in range(2):
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
    process.kill()


def dry(script: str, *flags: object, **env: object) -> list[str]:
    """Returns the words of the command that a script would run, without the variables before them."""
    code, out, err = end(start(script, "--dry-run", *flags, **env))
    assert (code, err) == (0, "")
    words = shlex.split(out.splitlines()[-1])
    return words[next(i for i, word in enumerate(words) if not re.match(r"\w+=", word)) :]


def logs(run: Path, pattern: str) -> list[str]:
    """Reads the logs of ranks, in the order of their names."""
    return [path.read_text() for path in sorted((run / "logs").rglob(pattern))]
