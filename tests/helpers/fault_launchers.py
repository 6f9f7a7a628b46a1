"""Worlds of two ranks that can be killed as clusters kill them: forked ranks, or a real launcher's."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import psutil
from command_line import free_port
from fault_runs import Ranks, start_ranks

VICTIMS = ("rank 0", "rank 1", "launcher")


def ranks_of(launcher: psutil.Process) -> dict[int, psutil.Process]:
    """Finds the processes of a real launcher that run our module by now, by rank."""
    found = {}
    for process in launcher.children(recursive=True):
        try:
            rank, words = process.environ().get("RANK"), process.cmdline()
        except psutil.Error:
            continue
        if rank is not None and "tezo_ds" in words and "deepspeed.launcher.launch" not in words:
            found[int(rank)] = process
    return found


class World(Protocol):
    """Two ranks of a run."""

    def wait(self, seconds: float) -> bool:
        """Waits until the run has ended; whether it did so in time."""

    def kill(self, victim: str, patience: float) -> None:
        """Kills one of `VICTIMS` and then whatever that leaves; returns when all is gone."""

    @property
    def code(self) -> int | None:
        """The exit code, the largest of all ranks; None while the run goes on."""


class Forked:
    """Two ranks started by `fault_runs.start_ranks`."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._ranks: Ranks = start_ranks(arguments, log)

    def wait(self, seconds: float) -> bool:
        return self._ranks.wait(seconds)

    def kill(self, victim: str, patience: float) -> None:
        if victim == "launcher":  # then the cluster's manager kills them one after the other
            self._ranks.kill(0)
            time.sleep(patience / 20)
        else:
            self._ranks.kill(VICTIMS.index(victim))
        self._ranks.end(0 if victim == "launcher" else patience)

    @property
    def code(self) -> int | None:
        codes = [abs(code) for code in self._ranks.codes if code is not None]
        return max(codes) if len(codes) == 2 else None


class Launched:
    """Two ranks under a real launcher: deepspeed for ZeRO-3, torchrun for FSDP2."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        folder = Path(sys.executable).parent
        if "--deepspeed" in arguments:
            launcher = [str(folder / "deepspeed"), "--num_gpus", "2", "--master_port"]
            launcher += [str(free_port()), "--module", "--", "tezo_ds"]
        else:
            launcher = [str(folder / "torchrun"), "--nproc-per-node", "2", "--master-port"]
            launcher += [str(free_port()), "-m", "--", "tezo_ds"]
        with log.open("a") as out:
            self._launcher = psutil.Popen(
                [*launcher, *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> bool:
        try:
            self._launcher.wait(seconds)
        except psutil.TimeoutExpired:
            return False
        return True

    def kill(self, victim: str, patience: float) -> None:
        try:
            all_of_it = self._launcher.children(recursive=True)
            rank = (
                None
                if victim == "launcher"
                else ranks_of(self._launcher).get(VICTIMS.index(victim))
            )
        except psutil.NoSuchProcess:
            return
        (rank or self._launcher).kill()
        if rank is not None:
            self.wait(patience)
        left = [process for process in (self._launcher, *all_of_it) if process.is_running()]
        for process in left:
            process.kill()
        psutil.wait_procs(left)

    @property
    def code(self) -> int | None:
        code: int | None = self._launcher.poll()
        return None if code is None else abs(code)
