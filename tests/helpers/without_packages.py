"""A process without packages that only some uses need: `python without_packages.py FOLDER`.

First the engine's own packages alone are there, then all but DeepSpeed. Prints a JSON line a case, which
tests/cli/test_package.py reads.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

from absent import hide

import tezo_ds
from tezo_ds.installed import COMMAND_LINE

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def tell(name: str, run: Callable[[], object]) -> None:
    """Prints what a case returned, wrote and raised."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run()
        except SystemExit as ended:
            code = ended.code
        except tezo_ds.TezoError as error:
            code, _ = 2, print(error, file=err)
    print(
        json.dumps({"case": name, "code": code, "out": out.getvalue(), "error": err.getvalue()}),
        flush=True,
    )


def the_engine_alone() -> None:
    from tiny import make_batch, tiny

    from tezo_ds.__main__ import main

    def own_loop() -> int:
        engine = tezo_ds.initialize(tiny(), {"rank": 3, "lr": 1e-4})
        print(len({engine.step(make_batch(3, seed=step)).loss for step in range(3)}))
        engine.merge()
        return 0

    tell("own loop", own_loop)
    zero3 = {"zero_optimization": {"stage": 3}, "tezo": {"rank": 3}}
    tell("own loop, zero3", lambda: tezo_ds.initialize(tiny(), zero3))
    tell("command line", main)


def all_but_deepspeed(folder: Path) -> None:
    from cli_fixtures import make_given
    from command_line import call, free_port

    given = make_given(folder)
    config = CONFIGS / "zero3_fp32.json"
    # Ranks first, as a fork takes no threads along.
    fork, port = multiprocessing.get_context("fork"), free_port()
    words = [str(one) for one in (*given.train(folder / "ranks", steps=2), "--fsdp")]
    ranks = [fork.Process(target=_rank, args=(rank, port, words)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    tell("fsdp2", lambda: max(rank.exitcode or 0 for rank in ranks))
    tell("train", lambda: call(*given.train(folder / "run", steps=2)))
    tell("zero3", lambda: call(*given.train(folder / "refused"), "--deepspeed", config))
    dry = ("plan", "--model", given.model, "--world", 2, "--dry-run")
    tell("plan", lambda: call(*dry))


def _rank(rank: int, port: int, words: list[str]) -> None:
    from command_line import call

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with contextlib.redirect_stdout(sys.stderr):
        sys.exit(call(*words))


if __name__ == "__main__":
    # All of the command line's but accelerate, as transformers asks for that once in a process.
    hidden = hide("deepspeed", *{*COMMAND_LINE} - {"accelerate"})
    the_engine_alone()
    hidden -= {*COMMAND_LINE}
    all_but_deepspeed(Path(sys.argv[1]))
    assert "deepspeed" not in sys.modules
