"""Cost of a step that trains adapters, over the plain forward of the same sequences.

Times, interleaved in one process: a plain no-grad forward of the same 2Q·B sequences; a step of tensor-train
adapters whose cores are contracted with each other first (parallel), or with the input one after the
other (sequential); of LoRA; and of TeZO's directions in all matrices. Prints medians, spread, ratios to the
plain forward taken within each round, the bytes of the tensors that each makes, at the peak, and these with
the weights over what the plain forward takes with them, which is inference.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --queries 1 --shapes 16x64 --sites mlp --clock processor
    python benchmarks/adapters.py --hidden 4096 --shapes 4x32 --only parallel
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from parts.common.machine import describe
from rich.console import Console
from rich.table import Table
from step_overhead import CLOCKS, arguments, load, make_batch, measure, spread

import tezo_ds
from tezo_ds.engine.live_bytes import LiveBytes

PLAIN = "plain forward"
TT: dict[str, Any] = {"adapter": "tt"}
STEPS: dict[str, dict[str, Any]] = {
    "parallel": TT, "sequential": {**TT, "contraction": "sequential"}, "lora": {"adapter": "lora"},
    "tezo": {"rank": 16, "exclude": ["*embed*", "*lm_head*"]},
}  # fmt: skip
AIM = 1.15  # of a step of tensor trains over the plain forward

Contestants = dict[str, Callable[[], object]]


def contestants(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], queries: int, sites: str, only: list[str]
) -> tuple[Contestants, dict[str, int]]:  # fmt: skip
    """Returns the steps to time, by name, all on one model that none of them changes; and how many numbers
    each trains."""
    made: Contestants = {}
    numel: dict[str, int] = {PLAIN: 0}
    for name, fields in STEPS.items():
        if name not in only:
            continue
        more = {"adapter_sites": sites} if fields.get("adapter") == "tt" else {}
        common = {"queries": queries, "lr": 1e-9, "probe": "fused", "shared_trunk": False}
        engine = tezo_ds.initialize(model, {**common, **more, **fields})
        if PLAIN not in made:
            made[PLAIN] = partial(engine.objective, batch, 2 * queries)
        made[name] = partial(engine.step, batch)
        numel[name] = engine.space.numel
    return made, numel


def peaks(steps: Contestants) -> dict[str, int]:
    """Returns the bytes of the tensors that each makes, at the peak."""
    found = {}
    for name, step in steps.items():
        step()  # so that nothing made once counts
        gc.collect()
        with LiveBytes() as live:
            step()
        found[name] = live.peak
    return found


def table_of(
    title: str,
    seconds: dict[str, list[float]],
    numel: dict[str, int],
    peak: dict[str, int],
    weights: int,
) -> Table:
    """Makes a table of one shape and number of directions, of a model whose weights take some bytes."""
    table = Table(
        "step", "numbers", "median ms", "10-90 % ms", "÷ plain forward", "10-90 %", "peak MB",
        "÷ inference", title=title,
    )  # fmt: skip
    for name, values in seconds.items():
        ratios = [value / plain for value, plain in zip(values, seconds[PLAIN], strict=True)]
        table.add_row(
            name, f"{numel[name]:,}", f"{statistics.median(values) * 1e3:.1f}", spread(values, 1e3, 1),
            f"{statistics.median(ratios):.3f}", spread(ratios, 1, 3), f"{peak[name] / 1e6:.1f}",
            f"{(weights + peak[name]) / (weights + peak[PLAIN]):.3f}",
        )  # fmt: skip
    return table


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.set_defaults(queries=[1, 4, 16], shapes=["4x32"])
    for action in parser._actions:
        if action.dest == "queries":
            action.nargs = "+"
    add = parser.add_argument
    add("--rounds", type=int, default=9)
    add("--only", nargs="+", choices=list(STEPS), default=list(STEPS), help="steps to time")
    add("--sites", choices=["after", "mlp"], default="after", help="where tensor trains stand")
    add(
        "--clock", choices=list(CLOCKS), default="wall", help="seconds of the wall or the processor"
    )
    args = parser.parse_args()
    console, model = Console(width=120), load(args)
    console.print(f"{describe()}; {args.clock} seconds")
    for shape in args.shapes:
        batch = make_batch(shape, model.config.vocab_size, args.labels)
        for queries in args.queries:
            steps, numel = contestants(model, batch, queries, args.sites, args.only)
            label = f"{shape} tokens, Q = {queries}"
            seconds = measure(steps, args.rounds, label, quiet=False, clock=CLOCKS[args.clock])
            title, weights = f"{label}, {args.dtype}", sum(p.nbytes for p in model.parameters())
            console.print(table_of(title, seconds, numel, peaks(steps), weights))
    console.print(f"aim of tensor trains: at most {AIM} of the plain forward")


if __name__ == "__main__":
    main()
