"""Seconds of a training step with `compile` and without, and what compiling takes.

Both engines share one model and take turns within each round. The compiled engine's first step, which
compiles with nothing kept from before, is timed apart.

    python benchmarks/compiled.py --shapes 4x32
    python benchmarks/compiled.py --shapes 4x32 --queries-each 8 --rounds 15
"""

from __future__ import annotations

import os
import statistics
import tempfile

import torch
from parts.common.machine import describe
from rich.console import Console
from rich.table import Table
from step_overhead import CLOCKS, arguments, load, make_batch, spread
from transformers import PreTrainedModel

import tezo_ds

EAGER, COMPILED = "eager", "compiled"
Batch = dict[str, torch.Tensor]


def engines(model: PreTrainedModel, rank: int, queries: int) -> dict[str, tezo_ds.Engine]:
    """Returns an engine of each kind on one model, which neither changes."""
    fields = {"rank": rank, "queries": queries, "lr": 1e-9, "probe": "fused"}
    return {
        name: tezo_ds.initialize(model, {**fields, "compile": name == COMPILED})
        for name in (EAGER, COMPILED)
    }


def timed(engine: tezo_ds.Engine, batch: Batch) -> dict[str, float]:
    """Makes a step; returns its seconds by each clock, and the loss."""
    start = {name: clock() for name, clock in CLOCKS.items()}
    loss = engine.step(batch).loss
    return {"loss": loss, **{name: clock() - start[name] for name, clock in CLOCKS.items()}}


def rows(
    both: dict[str, tezo_ds.Engine], batch: Batch, rounds: int, first: dict[str, float]
) -> list[list[str]]:
    """Returns cells of a table by each clock: the first step, medians and the median ratio."""
    for engine in both.values():  # a step more to warm up
        engine.step(batch)
    took = [{name: timed(engine, batch) for name, engine in both.items()} for _ in range(rounds)]
    cells = []
    for clock in CLOCKS:
        seconds = {name: [turn[name][clock] for turn in took] for name in both}
        ratios = [a / b for a, b in zip(seconds[COMPILED], seconds[EAGER], strict=True)]
        medians = [f"{statistics.median(seconds[name]):.3f}" for name in both]
        ratio = f"{statistics.median(ratios):.3f}"
        cells.append([clock, f"{first[clock]:.0f}", *medians, ratio, spread(ratios, 1, 3)])
    return cells


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--queries-each", type=int, nargs="+", default=[1, 4], help="values of Q")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    console = Console(width=110)
    console.print(describe())
    table = Table(
        "B x T", "Q", "clock", "first step s", "eager s", "compiled s", "ratio", "10–90 %"
    )
    model = load(args)
    for shape in args.shapes:
        batch = make_batch(shape, model.config.vocab_size, args.labels)
        for queries in args.queries_each:
            both = engines(model, args.rank, queries)
            with tempfile.TemporaryDirectory() as folder:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
                first = timed(both[COMPILED], batch)
            loss = timed(both[EAGER], batch)["loss"]
            console.print(f"Q={queries}: loss {first['loss']:.8f} compiled, {loss:.8f} eager")
            for cells in rows(both, batch, args.rounds, first):
                table.add_row(shape, str(queries), *cells)
    console.print(table)


if __name__ == "__main__":
    main()
