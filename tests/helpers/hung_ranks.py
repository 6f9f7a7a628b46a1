"""Runs of `tezo-ds` side by side, on three ranks each, one in trouble; all ranks are forks of one process."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tezo_ds import cli
from tezo_ds.training import step_batches

RANKS, LIMIT = 3, 10  # seconds of --timeout
Run = tuple[str, int, int, list[str]]  # trouble, the rank in it, at which step, arguments


def get_into(trouble: str) -> None:
    if trouble == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif trouble == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif trouble == "sleep":
        time.sleep(3600)
    else:
        raise ValueError(f"{trouble}\nand more")


def run_rank(rank: int, port: int, trouble: str, hung: int, step: int, folder: Path) -> None:
    """Runs one rank, which gets into trouble if it is `hung`; never returns."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    collate: Callable[..., dict[str, torch.Tensor]] = step_batches.collate
    batches = 0

    def collate_until(*args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        nonlocal batches
        if batches == step:
            time.sleep(1.2 * LIMIT / 10)  # a beat and more, so that all have told of this step
            (folder / f"since{rank}").touch()
            if rank == hung:
                get_into(trouble)
        batches += 1
        return collate(*args, **kwargs)

    step_batches.collate = collate_until  # type: ignore[assignment]
    os.dup2(os.open(folder / f"err{rank}", os.O_WRONLY | os.O_CREAT), 2)
    code = 1
    try:
        cli.main()
        code = 0
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_world(ends: Path, trouble: str, hung: int, step: int, arguments: list[str]) -> None:
    sys.argv = ["tezo-ds", *arguments]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, ranks = Path(tempfile.mkdtemp()), {}
    for rank in range(RANKS):
        process = os.fork()
        if not process:
            run_rank(rank, port, trouble, hung, step, folder)
        ranks[process] = rank
    for _ in range(RANKS):
        if list(ranks.values()) == [hung]:
            os.kill(next(iter(ranks)), signal.SIGKILL)
        process, status = os.wait()
        rank, begun = ranks.pop(process), folder / "since0"
        line = {
            "run": [trouble, hung], "rank": rank, "code": os.waitstatus_to_exitcode(status),
            "seconds": time.time() - begun.stat().st_mtime if begun.exists() else None,
            "err": (folder / f"err{rank}").read_text(),
        }  # fmt: skip
        with ends.open("a") as out:  # in one piece, beside the others
            out.write(json.dumps(line) + "\n")


def main(runs: Sequence[Run], ends: Path) -> None:
    """Runs the worlds side by side. Each rank leaves a line of JSON in `ends`: its run's trouble and rank,
    its own rank, its exit code, what it wrote to stderr, and the seconds from the trouble to its end."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for run in runs:
        if not os.fork():
            run_world(ends, *run)
            os._exit(0)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return
