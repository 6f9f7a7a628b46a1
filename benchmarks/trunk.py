"""Cost of a step that trains late layers alone, over the plain forward of the same sequences.

Times, interleaved in one process or in ranks: a plain no-grad forward of the same 2Q·B sequences; a fused
step whose branches all run all layers (`shared_trunk: false`); one that runs the layers before the first
trained one once for all branches (shared, the default); and one that has their hidden states from an
earlier visit (cached, `trunk_cache: memory`). Prints medians, spread, and ratios to the plain forward taken
within each round, beside what they would be if blocks alone took time, and the aim.

    python benchmarks/trunk.py
    python benchmarks/trunk.py --late 6 --queries 16 --labels all --clock processor --json trunk.json
    python benchmarks/trunk.py --sharding zero3 --ranks 2 --late 6 --queries 1

With --sharding every rank has a batch of its own, a wall time is that of the slowest rank and a processor
time that of rank 0, and before each timed step under ZeRO-3 come two of the same kind, as DeepSpeed has to
learn the order of layers anew.
"Gathered" are bytes of whole all-gathers in a step, padding included; "peak" those of tensors alive at once
beside shards of weights and factors, the cache included.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from parts.common.backends import BACKENDS, batch_of, on_ranks, place
from parts.common.machine import describe
from parts.scaling.measure import Traffic, gathered
from rich.console import Console
from rich.table import Table
from step_overhead import CLOCKS, ROOT, load, make_batch, measure, spread

import tezo_ds
from tezo_ds.engine.live_bytes import LiveBytes
from tezo_ds.models.structure import blocks
from tezo_ds.trunk.trunk import EXAMPLE_IDS

PLAIN = "plain forward"
AIMS = {("shared", 6, 1): 0.62, ("shared", 6, 16): 0.27, ("cached", 6, 1): 0.23,
        ("cached", 6, 4): 0.23, ("cached", 6, 16): 0.23}  # fmt: skip
AIMED = 30  # layers of the model that these are for, in one process, of a label an example
LEARNING = 2  # steps in which DeepSpeed learns the order of layers

Batch = dict[str, torch.Tensor]


@dataclass
class Row:
    """One way to make a step.

    Attributes:
        late: layers that train.
        blocks_alone: share of a plain forward's runs of blocks that the step makes.
        aim: ratio to reach; None: none is set.
        cache: bytes of an example that the way keeps.
        gathered: bytes of a step's all-gathers, on this rank.
        peak: bytes of tensors; the most of any rank.
    """

    way: str
    shape: str
    late: int
    queries: int
    blocks_alone: float
    aim: float | None
    cache: float = 0.0
    gathered: int = 0
    peak: int = 0
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median over rounds of the time over the plain forward's of the same round."""
        return statistics.median(self.ratios)

    def cells(self) -> list[str]:
        """Returns the cells of the table's line."""
        return [
            self.way, f"{statistics.median(self.seconds) * 1e3:.1f}", spread(self.seconds, 1e3, 1),
            f"{self.ratio:.3f}", spread(self.ratios, 1, 3), f"{self.blocks_alone:.3f}",
            "" if self.aim is None else f"{self.aim:.2f}", f"{self.gathered / 1e6:.1f}",
            f"{self.peak / 1e6:.1f}", f"{self.cache / 1e3:.1f}" if self.cache else "",
        ]  # fmt: skip


def fields_of(args: argparse.Namespace, late: int, queries: int) -> dict[str, Any]:
    """Returns the fields that the steps have in common."""
    return {
        "rank": args.rank, "queries": queries, "lr": 1e-9, "include": [f"last:{late}"],
        "exclude": args.exclude, "probe": "fused", "check_every": 0,
    }  # fmt: skip


def contestants(
    model: torch.nn.Module, fields: dict[str, Any], batch: Batch
) -> tuple[dict[str, Callable[[], object]], tezo_ds.Engine]:
    """Returns the steps to time, by name, and the engine that caches. All are of one model."""
    whole = tezo_ds.initialize(model, {**fields, "shared_trunk": False})
    shared = tezo_ds.initialize(model, fields)
    cached = tezo_ds.initialize(model, {**fields, "trunk_cache": "memory"})
    numbered = {**batch, EXAMPLE_IDS: torch.arange(len(batch["input_ids"]))}
    steps: dict[str, Callable[[], object]] = {
        PLAIN: lambda: whole.objective(batch, 2 * fields["queries"]),
        "plain step": lambda: whole.step(batch),
        "shared": lambda: shared.step(batch),
        "cached": lambda: cached.step(numbered),
    }
    return steps, cached


def rows_of(
    args: argparse.Namespace, model: torch.nn.Module, shape: str, vocabulary: int, rank: int,
    live: LiveBytes,
) -> Iterator[list[Row]]:  # fmt: skip
    """Yields the rows of each number of layers and of directions."""
    layers = len(blocks(model))
    aimed = (layers, args.labels, args.sharding) == (AIMED, "last", "none")
    for late in args.late:
        for queries in args.queries:
            batch = make_batch(shape, vocabulary, args.labels, seed=batch_of(args.sharding, rank))
            learning = LEARNING if args.sharding.startswith("zero3") else 0
            steps, cached = contestants(model, fields_of(args, late, queries), batch)
            rows = []
            for way, step in steps.items():
                share = {
                    "shared": (layers - late + 2 * queries * late) / (2 * queries * layers),
                    "cached": late / layers,
                }.get(way, 1.0)
                aim = AIMS.get((way, late, queries)) if aimed else None
                row = Row(way, shape, late, queries, share, aim)
                row.gathered, row.peak = cost(step, live, 1 + learning)
                rows.append(row)
            trunk = cached.objective.trunk
            assert trunk is not None and trunk.cache is not None
            rows[-1].cache = sum(
                entry.nbytes for entry in map(trunk.cache.get, range(len(batch["input_ids"])))
            ) / len(batch["input_ids"])
            label = f"{shape}, last {late}, Q={queries}"
            clock = CLOCKS[args.clock]
            seconds = measure(steps, args.rounds, label, rank > 0, clock, learning)
            for row in rows:
                row.seconds = seconds[row.way]
                row.ratios = [a / b for a, b in zip(row.seconds, seconds[PLAIN], strict=True)]
            yield rows
            del steps, cached, trunk
            gc.collect()


def cost(step: Callable[[], object], live: LiveBytes, before: int) -> tuple[int, int]:
    """Measures bytes of a step's all-gathers, and its peak of tensors made by steps. Makes `before` steps
    first: the trunk is found, the cache filled, and DeepSpeed knows the layers' order."""
    with live:
        for _ in range(before):
            step()
        live.peak = 0
        with Traffic() as traffic:
            step()
    peaks = gathered(live.peak) if dist.is_initialized() else [live.peak]
    return sum(call.nbytes for call in traffic.calls if call.gathers), max(peaks)


def table_of(rows: list[Row], title: str) -> Table:
    """Makes a table of the rows of one number of layers and directions."""
    table = Table(title=title)
    for column in (
        "way", "ms", "10–90 % ms", "÷ plain", "10–90 %", "blocks", "aim", "gathered MB", "peak MB",
        "kB/example",
    ):  # fmt: skip
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row.cells())
    return table


def run(rank: int, args: argparse.Namespace) -> None:
    """Times every setting; rank 0 prints, and writes the file."""
    console, machine = Console(quiet=rank > 0, width=130), describe()
    console.print(machine)
    loaded = load(args)
    vocabulary = cast(Any, loaded).config.vocab_size
    model, live, found = place(loaded, args.sharding), LiveBytes(), []
    backend = "" if args.sharding == "none" else f", {args.sharding} on {args.ranks} ranks"
    for shape in args.shapes:
        for rows in rows_of(args, model, shape, vocabulary, rank, live):
            first = rows[0]
            console.print(
                table_of(
                    rows,
                    f"last {first.late} layers, Q={first.queries}, {shape} tokens, labels "
                    f"{args.labels}, r={args.rank}, {args.dtype}{backend}; {args.clock} time",
                )
            )
            found += [{**asdict(row), "ratio": row.ratio} for row in rows]
    if rank == 0 and args.json:
        same = {"machine": machine, "command": args.command, "sharding": args.sharding}
        args.json.write_text(json.dumps({**same, "rows": found}, indent=1) + "\n")


def arguments() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default=str(ROOT / ".cache/quickstart/SmolLM2-135M-Instruct"))
    add("--shapes", nargs="+", default=["4x32"], help="B x T")
    add("--late", nargs="+", type=int, default=[6, 3], help="layers that train, the last of all")
    add("--queries", nargs="+", type=int, default=[1, 4, 16])
    add("--rank", type=int, default=16)
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    add("--labels", default="last", choices=["last", "all"])
    add("--exclude", nargs="*", default=[], help="glob patterns of frozen matrices")
    add("--rounds", type=int, default=15)
    add(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="processor: for a machine that is shared",
    )
    add("--sharding", default="none", choices=BACKENDS)
    add("--ranks", type=int, default=2, help="processes of a sharded run")
    add("--json", type=Path, help="file to write all numbers into")
    parser.set_defaults(hidden=None)
    return parser


def main(words: Sequence[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(words)
    args.command = " ".join(
        ["python benchmarks/trunk.py", *(sys.argv[1:] if words is None else words)]
    )
    on_ranks(parser, args, run)


if __name__ == "__main__":
    main()
