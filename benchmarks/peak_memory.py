"""Peak memory of a training step over that of the plain forward of the same sequences.

Each contestant runs three times in a process of its own. "Process" is, on the CPU, the peak of resident
memory since the model was loaded, less what Python and its libraries took before: it has pages that the
allocator keeps. On an accelerator it is what torch allocated. "Tensors" are the bytes of all tensors
that are alive at once.

    python benchmarks/peak_memory.py
    python benchmarks/peak_memory.py --hidden 2048 --shapes 4x32
    MALLOC_MMAP_THRESHOLD_=131072 python benchmarks/peak_memory.py --hidden 2048 --shapes 4x32 --methods

With --methods (all, or those named) each trains with the probe that it takes by default, and "bound" is
what `tests/helpers/process_memory.py` allows it. glibc keeps freed blocks unless told at which size not to.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from parts.common.apart import found_apart
from parts.common.machine import describe
from rich.console import Console
from rich.table import Table
from step_overhead import ROOT, arguments, load, make_batch, random_llama
from transformers import PreTrainedModel

import tezo_ds
from tezo_ds.losses.objective import Objective
from tezo_ds.sharding import sharding_of

sys.path.append(str(ROOT / "tests" / "helpers"))
from process_memory import may_take, process_peak

from tezo_ds.config.registry import METHODS
from tezo_ds.engine.live_bytes import LiveBytes

PLAIN, PROBES = "plain forward", ("fused", "inplace")


def prepare(args: argparse.Namespace, name: str, model: PreTrainedModel) -> Callable[[], object]:
    """Returns the function to run: a step, or a plain forward, which knows of no factors."""
    batch = make_batch(args.shapes[0], model.config.vocab_size, args.labels)
    if name == PLAIN:
        objective = Objective(sharding_of(model.eval()), None)
        return lambda: objective(batch, 2 * args.queries)
    fields: dict[str, Any] = {"queries": args.queries, "exclude": args.exclude}
    fields |= {"probe": name} if name in PROBES else {"method": name}
    if not name.startswith("lozo"):  # whose rank is another by default
        fields["rank"] = args.rank
    engine = tezo_ds.initialize(model, fields)
    return lambda: engine.step(batch)


def peaks_of(args: argparse.Namespace, name: str) -> dict[str, int]:
    """Measures peak bytes of three runs, the model included, of the process and of tensors; and the bytes of
    the weights that train."""
    models: list[PreTrainedModel] = []

    def make() -> PreTrainedModel:
        models.append(load(args))
        return models[0]

    process = process_peak(random_llama(128), make, lambda model: prepare(args, name, model))
    model = models[0]
    weights = [p.numel() * p.itemsize for p in model.parameters()]
    matrices = [p.numel() * p.itemsize for p in model.parameters() if p.dim() > 1]
    peaks = {"process": process, "weights": sum(matrices)}
    if args.methods is None:
        with LiveBytes() as live:
            again = prepare(args, name, model)  # so that its factors count
            again()
            live.peak = 0
            again()
        peaks["tensors"] = sum(weights) + live.peak
    return peaks


def measure(name: str, shape: str, arguments: list[str]) -> dict[str, int]:
    """Measures the peaks of one contestant in a fresh process."""
    peaks: dict[str, int] = found_apart(__file__, *arguments, "--shapes", shape, "--one", name)
    return peaks


def table_of_probes(peaks: dict[str, dict[str, int]], title: str) -> Table:
    """Makes a table of process and tensors of a plain forward and of TeZO by both probes."""
    columns = ("process MB", "÷ plain forward", "tensors MB", "÷ plain forward")
    table = Table("step", *columns, title=title)
    for name, peak in peaks.items():
        pairs = ((peak[of], peaks[PLAIN][of]) for of in ("process", "tensors"))
        cells = [cell for p, base in pairs for cell in (f"{p / 1e6:.0f}", f"{p / base:.3f}")]
        table.add_row(name, *cells)
    return table


def table_of_methods(peaks: dict[str, dict[str, int]], title: str) -> Table:
    """Makes a table of the process of a plain forward and of each method."""
    table = Table("method", "process MB", "÷ plain forward", "bound", title=title)
    plain = peaks[PLAIN]["process"]
    for name, peak in peaks.items():
        most = 1 if name == PLAIN else may_take(name, plain, peak["weights"]) / plain
        ratio = f"{peak['process'] / plain:.3f}"
        table.add_row(name, f"{peak['process'] / 1e6:.0f}", ratio, f"{most:.3f}")
    return table


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), help="those named, or all")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(peaks_of(args, args.one)))
        return
    console = Console()
    console.print(describe())
    names = PROBES if args.methods is None else args.methods or list(METHODS)
    for shape in args.shapes:
        peaks = {name: measure(name, shape, sys.argv[1:]) for name in (PLAIN, *names)}
        table = table_of_probes if args.methods is None else table_of_methods
        console.print(table(peaks, f"{shape} tokens, r={args.rank}, Q={args.queries}"))


if __name__ == "__main__":
    main()
