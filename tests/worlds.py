"""Worlds of gloo ranks that stay up for many cases, as importing and joining costs 10 s a process.

Ranks of all sizes are forked from one process that has imported and compiled everything.

A case is a function of a `World`, decorated with `@case(worlds=(2, 3))`; every rank runs it and any
rank's exception fails it. `python tests/worlds.py SIZE FOLDER` starts the ranks of one size, runs all
their cases in order and leaves one JSON line a case and rank, and in FOLDER/log what they printed. More
sizes, each with its folder, run one after the other.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULES = (
    "world_replicated",
    "world_zero3",
    "world_hazards",
    "world_offload",
    "world_configs",
    "world_fsdp2",
    "world_loading",
    "world_fsdp_runs",
    "world_everywhere",
    "world_methods",
    "world_directions",
    "world_ranks",
    "world_radius",
    "world_watch",
    "world_stop",
    "world_traffic",
    "world_merged",
    "world_snapshots",
    "world_doctor",
    "world_plan",
    "world_scaling",
)
TIMEOUT = 900  # seconds for all cases of one size, beside other tests


@dataclass(frozen=True)
class World:
    """What a case knows of where it runs."""

    rank: int
    size: int
    folder: Path  # shared by the ranks


@dataclass(frozen=True)
class Case:
    name: str
    worlds: tuple[int, ...]
    run: Callable[[World], None]


CASES: list[Case] = []


def case(worlds: tuple[int, ...]) -> Callable[[Callable[[World], None]], Callable[[World], None]]:
    """Registers a case for these world sizes."""

    def register(run: Callable[[World], None]) -> Callable[[World], None]:
        CASES.append(Case(f"{run.__module__}.{run.__name__}", worlds, run))
        return run

    return register


def load_cases() -> list[Case]:
    """All cases of all modules, in order."""
    sys.path.insert(0, str(HERE))
    registry = importlib.import_module("worlds").CASES  # not __main__'s, when run as a script
    for module in MODULES:
        importlib.import_module(module)
    return registry


class Background:
    """Worlds that run one after the other beside the single-process tests, which leave a core idle."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self._temporary = tempfile.TemporaryDirectory()
        self._folders = {size: Path(self._temporary.name, str(size)) for size in sizes}
        self._process: subprocess.Popen[bytes] | None = None
        if self._folders:
            self._process = self._start()

    def results(self, size: int) -> dict[str, list[str]]:
        """The errors of each case ([] where all ranks passed), once the worlds have ended."""
        assert self._process is not None
        self._process.wait()
        return _errors(size, self._folders[size])

    def stop(self) -> None:
        """Ends the world that runs, and starts no other."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._temporary.cleanup()

    def _start(self) -> subprocess.Popen[bytes]:
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        words: list[str | Path] = [sys.executable, __file__]
        for size, folder in self._folders.items():
            folder.mkdir()
            words += [str(size), folder]
        return subprocess.Popen(words, env=env, start_new_session=True)


def _errors(size: int, folder: Path) -> dict[str, list[str]]:
    lines = [
        json.loads(line)
        for path in sorted(folder.glob("rank*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    errors: dict[str, list[str]] = {}
    for name in (c.name for c in load_cases() if size in c.worlds):
        of_case = [line for line in lines if line["case"] == name]
        errors[name] = [f"rank {x['rank']}: {x['error']}" for x in of_case if x["error"]]
        if len(of_case) < size and not errors[name]:
            tail = (folder / "log").read_text()[-2000:]
            errors[name] = [f"only {len(of_case)} of {size} ranks finished it; log ends: {tail}"]
    return errors


def _rank_main(rank: int, size: int, folder: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    from datetime import timedelta

    import torch
    from deepspeed.utils import groups

    from tezo_ds.sharding import zero3

    zero3.init_distributed(timeout=timedelta(seconds=60))
    world = World(rank, size, Path(folder))
    with (world.folder / f"rank{rank}.jsonl").open("w") as out:
        for c in (c for c in load_cases() if size in c.worlds):
            start, error = time.perf_counter(), ""
            try:
                c.run(world)
            except BaseException:
                error = traceback.format_exc()
            groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's, which DeepSpeed makes but once
            seconds = round(time.perf_counter() - start, 2)
            line = {"case": c.name, "rank": rank, "seconds": seconds, "error": error}
            print(json.dumps(line), file=out, flush=True)
    torch.distributed.destroy_process_group()


def _run(size: int, folder: Path) -> None:
    """One world, from its start to its end or `TIMEOUT`."""
    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (size, str(folder), port)
    ranks = mp.start_processes(_rank_main, arguments, size, join=False, start_method="fork")
    deadline = time.monotonic() + TIMEOUT
    try:
        while not ranks.join(max(deadline - time.monotonic(), 0)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{size} ranks have not ended in {TIMEOUT} s")
    finally:
        for rank in ranks.processes:
            rank.kill()


def main() -> None:
    import torch

    torch.set_num_threads(1)  # also because a fork takes no other threads along
    load_cases()
    import tezo_ds.philox_cpu  # noqa: F401  # compiled once, draws of any size are 20 times as fast

    failed = False
    for size, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        with Path(folder, "log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            _run(int(size), Path(folder))
        except Exception:  # the other sizes run all the same
            traceback.print_exc()
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
