"""Peak memory of a training step over that of the plain forward of the same sequences.

Each contestant runs three times in a process of its own. "Process" is, on the CPU, the peak of resident
memory since the model was loaded, less what Python and its libraries took before: it has pages that the
allocator keeps and code that is loaded on the way. On an accelerator it is what torch allocated.
"Tensors" are the bytes of all tensors that are alive at once.

    python benchmarks/peak_memory.py
    python benchmarks/peak_memory.py --hidden 2048 --shapes 4x32
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe
from rich.console import Console
from rich.table import Table
from step_overhead import ROOT, arguments, load, make_batch
from transformers import PreTrainedModel

import tezo_ds
from tezo_ds.objective import Objective
from tezo_ds.sharding import sharding_of

sys.path.append(str(ROOT / "tests"))
from live_bytes import LiveBytes

NAMES = ("plain forward", "fused", "inplace")


def _status(field: str) -> int:
    """Bytes of one line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def prepare(args: argparse.Namespace, name: str, model: PreTrainedModel) -> Callable[[], object]:
    """What is to be run; a plain forward knows of no factors."""
    batch = make_batch(args.shapes[0], model.config.vocab_size, args.labels)
    if name == "plain forward":
        objective = Objective(sharding_of(model.eval()), None)
        return lambda: objective(batch, 2 * args.queries)
    fields = {"rank": args.rank, "queries": args.queries, "probe": name, "exclude": args.exclude}
    engine = tezo_ds.initialize(model, fields)
    return lambda: engine.step(batch)


def peaks_of(args: argparse.Namespace, name: str) -> tuple[int, int]:
    """Bytes at the highest point of three runs, the model included: of the process, of tensors."""
    before = 0 if torch.accelerator.is_available() else _status("VmRSS")
    model = load(args)
    run = prepare(args, name, model)
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of loading
    for _ in range(3):
        run()
    if torch.accelerator.is_available():
        process = torch.accelerator.max_memory_allocated()
    else:
        process = _status("VmHWM") - before
    with LiveBytes() as live:
        again = prepare(args, name, model)  # so that its factors count
        again()
        live.peak = 0
        again()
    weights = sum(p.numel() * p.itemsize for p in model.parameters())
    return process, weights + live.peak


def measure(name: str, shape: str, arguments: list[str]) -> tuple[int, int]:
    """Peaks of one contestant in a fresh process."""
    command = [sys.executable, __file__, *arguments, "--shapes", shape, "--one", name]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    process, tensors = json.loads(found.stdout.splitlines()[-1])
    return process, tensors


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(peaks_of(args, args.one)))
        return
    console = Console()
    console.print(describe())
    for shape in args.shapes:
        peaks = {name: measure(name, shape, sys.argv[1:]) for name in NAMES}
        columns = ("process MB", "÷ plain forward", "tensors MB", "÷ plain forward")
        table = Table("step", *columns, title=f"{shape} tokens, r={args.rank}, Q={args.queries}")
        for name, peak in peaks.items():
            pairs = zip(peak, peaks["plain forward"], strict=True)
            cells = [cell for p, base in pairs for cell in (f"{p / 1e6:.0f}", f"{p / base:.3f}")]
            table.add_row(name, *cells)
        console.print(table)


if __name__ == "__main__":
    main()
