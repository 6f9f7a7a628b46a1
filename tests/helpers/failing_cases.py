"""Cases that fail, for the test of the runner of worlds."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch.distributed as dist
import worlds
from worlds import World, case


def goes_well(world: World) -> None:
    dist.barrier()


def fails_on_one_rank(world: World) -> None:
    if world.rank == 1:
        raise ValueError("the first to fail")
    dist.barrier()


def hangs_on_the_other(world: World) -> None:
    if world.rank == 0:
        raise ValueError("nobody else notices")
    time.sleep(600)


def goes_well_again(world: World) -> None:
    dist.barrier()


def run(folder: Path) -> None:
    """Runs the cases and writes the errors of each to FOLDER/errors.json."""
    worlds.MODULES, worlds.GRACE = (), 1
    for each in (goes_well, fails_on_one_rank, hangs_on_the_other, goes_well_again):
        case(worlds=(2,))(each)  # not when imported, or the suite would have them
    (folder / "log").touch()
    (folder / "cases.json").write_text(json.dumps([one.name for one in worlds.CASES]))
    worlds._run(2, folder)
    (folder / "errors.json").write_text(json.dumps(worlds._errors(2, folder)))
