"""Real ranks to kill, and comparisons of the folders that they leave.

Importing torch, transformers and DeepSpeed costs ten seconds a process. So `start_ranks` forks them from
a `server` that has imported all that; from there on they are what a launcher starts.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

from command_line import Given, free_port
from safetensors.torch import load_file

from tezo_ds.files.tensors import digest
from tezo_ds.quiet import LOG
from tezo_ds.run.folder import (
    ADAPTER,
    COEFFICIENTS,
    CONFIG,
    JOURNAL,
    METRICS,
    MODEL,
    SNAPSHOTS,
    SUMMARY,
    read_metrics,
)
from tezo_ds.run.journal import read_journal

STEPS, SNAPSHOT_EVERY, EVAL_EVERY = 21, 4, 6
PLAN = {
    "steps": STEPS, "snapshot_every": SNAPSHOT_EVERY, "eval_every": EVAL_EVERY, "check_every": 3,
    "log_every": 1, "timeout": 20, "lr": 1e-3,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "tezo": {"queries": 2, "clip_kappa": 0.8},
    "tezo-m": {"refresh_every": 5},
    "tezo-adam-coef": {"rank": "auto", "rank_max": 3, "rank_threshold": 0.1},
    "tezo-adam": {"rho": "auto"},
    "lozo-m": {"rank": 2, "nu": 5, "lr": 2e-4},
    "mezo": {"rank": None, "lr": 2e-4},
    "mezo-adam": {"rank": None, "lr": 2e-4, "include": "*v_proj*"},
}
SHARDINGS = ("zero3", "fsdp2")
_WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def arguments_of(given: Given, run: Path, sharding: str, method: str, **more: Any) -> list[str]:
    """Returns the arguments of `tezo-ds` for a run of one method; `more` comes on top of `PLAN`."""
    options = {"method": method, **PLAN, **METHODS[method], **more}
    if sharding == "zero3":
        config = given.model.parent / "zero3.json"
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
        config.write_text(json.dumps({"zero_optimization": zero, "tezo": {}}))
        options["deepspeed"] = config
    elif sharding == "fsdp2":
        options["fsdp"] = True
    return given.train(run, **options)


@dataclass(frozen=True)
class Ranks:
    """The processes of one run.

    Attributes:
        processes: by rank.
        log: what they all print.
    """

    processes: Sequence[BaseProcess]
    log: Path

    @property
    def codes(self) -> list[int | None]:
        """Exit codes; None of a rank that runs, negative of one that a signal killed."""
        return [process.exitcode for process in self.processes]

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to all ranks."""
        for process in self.processes:
            assert process.pid is not None
            os.kill(process.pid, number)

    def kill(self, *ranks: int) -> None:
        """Kills ranks by SIGKILL, one after the other; returns when they are gone."""
        for rank in ranks:
            self.processes[rank].kill()
        for rank in ranks:
            self.processes[rank].join()

    def wait(self, seconds: float) -> bool:
        """Waits until all ranks have ended; whether they did so in time."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0.001))
        return None not in self.codes

    def end(self, patience: float) -> bool:
        """Ends the ranks as a launcher does when one has gone: SIGTERM, and SIGKILL after some seconds.
        Returns whether none needed SIGKILL."""
        for process in self.processes:
            process.terminate()
        ended = self.wait(patience)
        self.kill(*range(len(self.processes)))
        return ended


def server() -> ForkServerContext:
    """Starts multiprocessing's fork server, whose processes are forks of one that has imported
    `fault_imports`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fault_imports"])
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # Python 3.11's server has no sys.path of ours, and passes over what it does not find.
    here, more = str(Path(__file__).parent), os.environ.get("PYTHONPATH")
    with mock.patch.dict(os.environ, PYTHONPATH=f"{here}{os.pathsep}{more}" if more else here):
        forkserver.ensure_running()
    return context


def start_ranks(arguments: Sequence[object], log: Path, size: int = 2) -> Ranks:
    """Starts `tezo-ds ARGUMENTS` on gloo ranks of this machine; their output is appended to `log`."""
    context, words, port = server(), [str(word) for word in arguments], free_port()
    log.touch()
    processes = [
        context.Process(target=_rank, args=(rank, size, port, words, log), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return Ranks(processes, log)


def _rank(rank: int, size: int, port: int, arguments: list[str], log: Path) -> None:
    assert "fault_imports" in sys.modules, "the server did not import it"
    place = (rank, rank, size, size, "127.0.0.1", port)
    os.environ |= dict(zip(_WORLD, map(str, place), strict=True))
    with log.open("a") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["tezo-ds", *arguments]
    from tezo_ds.cli import main

    main()


def phase(run: Path, started: float) -> str:
    """Tells what a run was doing when it was killed, by the files that it left.

    Args:
        run: its folder.
        started: Unix time at which its processes were started.
    """
    config, journal, metrics = run / CONFIG, run / JOURNAL, run / METRICS
    if not journal.exists() or config.stat().st_mtime < started:
        return "loading"
    done = len(read_journal(journal).steps)
    _, scores = read_metrics(metrics)
    if (run / SUMMARY).exists():
        return "over"
    if not scores or (done == STEPS and scores[-1]["step"] < STEPS):
        return "evaluation"
    if done == STEPS:
        return "results"
    if done and done % SNAPSHOT_EVERY == 0 and not _snapshot(run, done).exists():
        return "snapshot"
    if done and done % EVAL_EVERY == 0 and scores[-1]["step"] < done:
        return "evaluation"
    return "step"


def _snapshot(run: Path, step: int) -> Path:
    return run / SNAPSHOTS / f"step-{step:08d}.safetensors"


def done_in(run: Path) -> int:
    """Counts the steps that are on disk."""
    return len(read_journal(run / JOURNAL).steps) if (run / JOURNAL).exists() else 0


def left_by(run: Path) -> dict[str, Any]:
    """Collects all of a finished run that must not depend on how often it was killed."""
    weights = sorted((run / MODEL).glob("*.safetensors"))
    steps, scores = read_metrics(run / METRICS)
    summary = json.loads((run / SUMMARY).read_text())
    timed = {"seconds", "tokens"}
    return {
        "journal": read_journal(run / JOURNAL).steps,
        "metrics": [{k: v for k, v in line.items() if k not in timed} for line in steps],
        "evaluations": scores,
        "summary": {k: v for k, v in summary.items() if not k.startswith("seconds")},
        "coefficients": _digest(run / COEFFICIENTS),
        "adapter": _digest(run / ADAPTER / "adapter_model.safetensors"),
        "model": [_digest(path) for path in weights],
        "snapshots": _snapshots(run),
        "files": sorted(path.name for path in run.iterdir() if path.name != LOG),
    }


def _snapshots(run: Path) -> list[str]:
    """Counts the whole snapshots, and names the other files beside them. The steps of snapshots may
    differ, as a run that was killed while it wrote one goes on without it."""
    names = {path.name for path in (run / SNAPSHOTS).iterdir()}
    states = {name for name in names if name.startswith("step-") and name.endswith(".safetensors")}
    shards = {name.removesuffix(".safetensors") for name in states}
    return [f"{len(states)} snapshots", *sorted(names - states - shards)]


def _digest(path: Path) -> str | None:
    return digest(load_file(path)) if path.exists() else None


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names the parts of two runs, each as of `left_by`, that differ."""
    return [name for name in one if one[name] != other[name]]


def fresh(folder: Path) -> Path:
    """Empties a folder, or makes it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
