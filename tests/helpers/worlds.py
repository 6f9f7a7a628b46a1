"""Worlds of gloo ranks that stay up for many cases, as importing and joining costs 10 s a process.

Ranks of all sizes are forked from one process that has imported and compiled everything.

A case is a function of a `World` in tests/ROOM/world_*.py, decorated with `@case(worlds=(2, 3))`; every rank
runs it and any rank's exception fails it. conftest.py makes a test of each case and size.
`python tests/helpers/worlds.py SIZE FOLDER` starts the ranks of one size, runs the cases that
FOLDER/cases.json names and leaves one JSON line a case and rank, and in FOLDER/log what they printed. Of more
worlds, each with its folder, two run at a time, as the ranks of one mostly wait for each other.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODULES = tuple(sorted((ROOT / "tests").glob("*/world_*.py")))
TIMEOUT = 900  # seconds for all cases of one world, beside other tests
GRACE = 10  # seconds for the other ranks, once one has failed
LANES = 2  # worlds at a time
MOST = 40  # cases of one world, so that both lanes end at about the same time
ONCE = "TEZO_TEST_ONCE"  # variable: where what `once` makes is kept


@dataclass(frozen=True)
class World:
    """The rank, size and folder of the world in which a case runs."""

    rank: int
    size: int
    folder: Path  # shared by the ranks


@dataclass(frozen=True)
class Case:
    name: str
    worlds: tuple[int, ...]
    run: Callable[[World], None]
    bits: bool


CASES: list[Case] = []


def case(
    worlds: tuple[int, ...], bits: bool = False
) -> Callable[[Callable[[World], None]], Callable[[World], None]]:
    """Registers a case for these world sizes; with `bits` the case promises equal bits, and runs with the
    kernels of other_kernels.py."""

    def register(run: Callable[[World], None]) -> Callable[[World], None]:
        CASES.append(Case(f"{run.__module__}.{run.__name__}", worlds, run, bits))
        return run

    return register


def load(module: Path) -> None:
    """Registers the cases of a file; its folder is in sys.path."""
    importlib.import_module(module.stem)


def cases_of(size: int, folder: Path) -> list[Case]:
    """Returns the cases of one world size that FOLDER/cases.json asks for, in the order of the modules."""
    registry = importlib.import_module("worlds").CASES  # not __main__'s, when run as a script
    asked = set(json.loads((folder / "cases.json").read_text()))
    return [case for case in registry if size in case.worlds and case.name in asked]


class Background:
    """Worlds that run beside the single-process tests, which leave a core idle."""

    def __init__(self, asked: Mapping[int, Sequence[str]]) -> None:
        """Starts the worlds.

        Args:
            asked: names of cases by the size of their world; the first sizes run first.
        """
        self._temporary = tempfile.TemporaryDirectory()
        self._folders: dict[Path, int] = {}  # sizes of worlds by their folders
        for size, names in asked.items():
            for first in range(0, len(names), MOST):
                folder = Path(self._temporary.name, f"{size}-{first}")
                folder.mkdir()
                (folder / "cases.json").write_text(json.dumps(names[first : first + MOST]))
                self._folders[folder] = size
        self._process: subprocess.Popen[bytes] | None = None
        if self._folders:
            self._process = self._start()

    def results(self, size: int) -> dict[str, list[str]]:
        """Returns the errors of each case ([] where all ranks passed), once the worlds have ended."""
        assert self._process is not None
        self._process.wait()
        errors: dict[str, list[str]] = {}
        for folder in (folder for folder, of in self._folders.items() if of == size):
            errors |= _errors(size, folder)
        return errors

    def seconds(self) -> dict[str, float]:
        """Returns how long each case that ended took its slowest rank, by name and size."""
        took: dict[str, float] = {}
        for folder, size in self._folders.items():
            for line in _lines(folder):
                name = f"{line['case']}[{size}]"
                took[name] = max(took.get(name, 0.0), line["seconds"])
        return took

    def stop(self) -> None:
        """Ends the world that runs, and starts no other."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._temporary.cleanup()

    def _start(self) -> subprocess.Popen[bytes]:
        kept = Path(self._temporary.name, "once")
        kept.mkdir()
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        env[ONCE] = str(kept)
        words: list[str | Path] = [sys.executable, __file__]
        for folder, size in self._folders.items():
            words += [str(size), folder]
        return subprocess.Popen(words, env=env, start_new_session=True)


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted(folder.glob("rank*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def _errors(size: int, folder: Path) -> dict[str, list[str]]:
    lines = _lines(folder)
    errors: dict[str, list[str]] = {}
    for name in (c.name for c in cases_of(size, folder)):
        of_case = sorted((x for x in lines if x["case"] == name), key=lambda line: line["at"])
        first, *others = [x for x in of_case if x["error"]] or [None]
        errors[name] = [f"rank {first['rank']} failed first: {first['error']}"] if first else []
        errors[name] += [f"then rank {x['rank']}: {_last_line(x['error'])}" for x in others]
        if len(of_case) < size and not errors[name]:
            tail = (folder / "log").read_text()[-2000:]
            errors[name] = [f"only {len(of_case)} of {size} ranks finished it; log ends: {tail}"]
    return errors


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def _rank_main(rank: int, size: int, folder: Path, port: int, first: int) -> None:
    """Runs cases from the first on. Leaves at a case that fails, without a goodbye: the others'
    connections break, so that none waits for what does not come."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    from datetime import timedelta

    import torch
    from deepspeed.utils import groups
    from other_kernels import VARIABLE, OtherKernels

    from tezo_ds.sharding import zero3

    zero3.init_distributed(timeout=timedelta(seconds=60))
    everywhere = os.environ.get(VARIABLE)
    with (folder / f"rank{rank}.jsonl").open("a") as out:
        for c in cases_of(size, folder)[first:]:
            start, error = time.perf_counter(), ""
            kernels = everywhere or ("shapes" if c.bits else None)
            try:
                with OtherKernels(kernels) if kernels else nullcontext():
                    c.run(World(rank, size, folder))
            except BaseException:
                error = traceback.format_exc()
            groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's, which DeepSpeed makes but once
            seconds = round(time.perf_counter() - start, 2)
            line = {
                "case": c.name, "rank": rank, "seconds": seconds, "error": error, "at": time.time(),
            }  # fmt: skip
            print(json.dumps(line), file=out, flush=True)
            if error:
                os._exit(1)
    torch.distributed.destroy_process_group()


def _run(size: int, folder: Path) -> None:
    """Runs all cases of one size by one world, and another one after each case that failed, until
    `TIMEOUT`."""
    deadline, done = time.monotonic() + TIMEOUT, 0
    while done < len(cases_of(size, folder)):
        _one_world(size, folder, done, deadline)
        finished = (_finished(folder / f"rank{rank}.jsonl") for rank in range(size))
        done = max(done + 1, *finished)


def _finished(records: Path) -> int:
    return len(records.read_text().splitlines()) if records.exists() else 0


def _one_world(size: int, folder: Path, first: int, deadline: float) -> None:
    """Forks the ranks and waits for them; once one has failed the others have `GRACE`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=_rank_main, args=(r, size, folder, port, first)) for r in range(size)
    ]
    for rank in ranks:
        rank.start()
    end = deadline
    try:
        while alive := [rank.sentinel for rank in ranks if rank.is_alive()]:
            if end == deadline and any(rank.exitcode for rank in ranks):
                end = min(end, time.monotonic() + GRACE)
            if time.monotonic() > end:
                break
            multiprocessing.connection.wait(alive, max(end - time.monotonic(), 0))
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    if time.monotonic() > deadline:
        raise TimeoutError(f"{size} ranks have not ended in {TIMEOUT} s")


def _lane(todo: multiprocessing.SimpleQueue[tuple[int, Path] | None]) -> None:
    """Runs one world after the other, each as it comes out of the queue, until None does."""
    failed = False
    while (one := todo.get()) is not None:
        size, folder = one
        with (folder / "log").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        try:
            _run(size, folder)
        except Exception:  # the others run all the same
            traceback.print_exc()
            failed = True
    sys.exit(failed)


def main() -> None:
    gc.disable()  # until all is imported, as collections would go through it again and again
    import torch

    torch.set_num_threads(1)  # also because a fork takes no other threads along
    for module in MODULES:
        load(module)
    # Compiled once, draws of any size are 20 times as fast; DeepSpeed's engines import the others late.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import setuptools  # noqa: F401

    import tezo_ds.rng.compiled
    import tezo_ds.training.loop  # noqa: F401

    gc.freeze()  # so that no rank's collections go through what is imported, nor copy its pages
    gc.enable()
    todo = multiprocessing.SimpleQueue()
    for size, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        todo.put((int(size), Path(folder)))
    for _ in range(LANES):
        todo.put(None)
    fork = multiprocessing.get_context("fork")
    lanes = [fork.Process(target=_lane, args=(todo,)) for _ in range(LANES)]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    sys.exit(any(lane.exitcode for lane in lanes))


if __name__ == "__main__":
    main()
