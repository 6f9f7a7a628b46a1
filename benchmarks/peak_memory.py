"""Peak memory of a training step over that of the plain forward of the same sequences.

Each contestant runs three times in a process of its own. On the CPU the peak is that of the process's
resident memory since the model was loaded, less what Python and its libraries took before; on an
accelerator what torch allocated.

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
from step_overhead import ROOT, SHAPES, make_batch, random_llama
from transformers import AutoModelForCausalLM

import tezo_ds
from tezo_ds.objective import Objective
from tezo_ds.sharding import sharding_of

NAMES = ("plain forward", "fused", "inplace")


def _status(field: str) -> int:
    """Bytes of one line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def peak_of(load: Callable[[], Callable[[], object]]) -> int:
    """Bytes at the highest point of three runs of what `load` returns, the model included."""
    if torch.accelerator.is_available():
        run = load()
        torch.accelerator.reset_peak_memory_stats()
        for _ in range(3):
            run()
        return torch.accelerator.max_memory_allocated()
    before = _status("VmRSS")
    run = load()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of loading
    for _ in range(3):
        run()
    return _status("VmHWM") - before


def contestant(args: argparse.Namespace, name: str) -> Callable[[], object]:
    """Loads a model and returns what is to be measured; a plain forward knows of no factors."""
    dtype = getattr(torch, args.dtype)
    if args.hidden:
        model = random_llama(args.hidden).to(dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    batch = make_batch(args.shapes[0], model.config.vocab_size, args.labels)
    if name == "plain forward":
        objective = Objective(sharding_of(model.eval()), None)
        return lambda: objective(batch, 2 * args.queries)
    fields = {"rank": args.rank, "queries": args.queries, "probe": name, "exclude": args.exclude}
    engine = tezo_ds.initialize(model, fields)
    return lambda: engine.step(batch)


def measure(name: str, shape: str, arguments: list[str]) -> int:
    """Peak of one contestant in a fresh process."""
    command = [sys.executable, __file__, *arguments, "--shapes", shape, "--one", name]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peak: int = json.loads(found.stdout.splitlines()[-1])
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / ".cache/quickstart/SmolLM2-135M-Instruct"))
    parser.add_argument("--hidden", type=int, help="two random Llama layers of this size instead")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="B x T, e.g. 16x64")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--labels", default="last", choices=["last", "all"])
    parser.add_argument("--exclude", nargs="*", default=[])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(peak_of(lambda: contestant(args, args.one)))
        return
    console = Console()
    console.print(describe())
    for shape in args.shapes:
        peaks = {name: measure(name, shape, sys.argv[1:]) for name in NAMES}
        table = Table("step", "peak MB", "÷ plain forward", title=f"{shape} tokens, r={args.rank}")
        for name, peak in peaks.items():
            table.add_row(name, f"{peak / 1e6:.0f}", f"{peak / peaks['plain forward']:.3f}")
        console.print(table)


if __name__ == "__main__":
    main()
