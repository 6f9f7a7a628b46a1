"""Costs of the journal: a line a step, its size, and resuming from it at OPT-30B's shape.

    python benchmarks/journal.py                  about two minutes, most of it the full replay
    python benchmarks/journal.py --steps 2000     a shorter journal

The model has names and shapes but no weights, as none are read. Slopes are random numbers. Resuming means
reading and checking the whole journal, loading the last snapshot and replaying what came after it.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from parts.common.machine import describe
from rich.console import Console
from rich.table import Table
from transformers import OPTConfig, OPTForCausalLM

from tezo_ds.config import TezoConfig
from tezo_ds.engine.engine import Engine
from tezo_ds.files.tensors import load, save
from tezo_ds.run.journal import Journal, read_journal
from tezo_ds.run.resuming import Begun, Snapshot, restore
from tezo_ds.sharding import sharding_of
from tezo_ds.training.display import Display

OPT_30B: dict[str, Any] = {
    "hidden_size": 7168, "ffn_dim": 28672, "num_hidden_layers": 48, "num_attention_heads": 56,
    "word_embed_proj_dim": 7168,
}  # fmt: skip


def opt_30b(queries: int) -> Engine:
    """Makes an engine of OPT-30B's matrices, rank 64, with momentum."""
    with torch.device("meta"):
        model = OPTForCausalLM(OPTConfig(**OPT_30B))
    fields = {"method": "tezo-m", "rank": 64, "lr": 1e-6, "queries": queries, "check_every": 0}
    return Engine(sharding_of(model), TezoConfig.model_validate(fields), None)


def write(path: Path, steps: int, queries: int) -> list[float]:
    """Writes a journal; returns the seconds of each line."""
    kappa = torch.randn(steps, queries, dtype=torch.float64) * 50
    journal, seconds = Journal(path, {"examples": 800, "data": "0" * 16}), []
    for step in range(steps):
        line = {"step": step, "kappa": kappa[step].tolist(), "rho": 1e-3, "lr": 1.2345678901234e-6}
        start = time.perf_counter()
        journal.append({**line, "loss": 2.3 + step * 1e-9, "seen": 16 * (step + 1)})
        seconds.append(time.perf_counter() - start)
    journal.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--after", type=int, default=499, help="steps since the last snapshot")
    parser.add_argument(
        "--step-ms", type=float, default=200, help="of a step that a line is added to"
    )
    args = parser.parse_args()
    importlib.import_module("tezo_ds.rng.compiled")  # compiles once a machine
    console, display = Console(), Display(1, 1, 1)
    console.print(describe(), soft_wrap=True)
    table = Table("what", "measured", title=f"{args.steps} steps of Q = {args.queries}")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "journal.jsonl"
        ms = 1e3 * statistics.median(write(path, args.steps, args.queries))
        table.add_row(
            "a line, on disk", f"{ms:.2f} ms ({ms / args.step_ms:.2%} of {args.step_ms:g} ms)"
        )
        table.add_row("journal", f"{path.stat().st_size / 1e6:.2f} MB")
        engine = opt_30b(args.queries)
        start = time.perf_counter()
        lines = read_journal(path).steps
        table.add_row("reading it", f"{time.perf_counter() - start:.2f} s")
        until = args.steps - args.after
        start = time.perf_counter()
        restore(engine, Begun(path.parent, steps=lines[:until]), display)
        seconds = time.perf_counter() - start
        each = f"{1e3 * seconds / until:.2f} ms a step"
        table.add_row(f"a full replay, D = {engine.space.numel}", f"{seconds:.1f} s, {each}")
        state = Path(folder) / "state.safetensors"
        start = time.perf_counter()
        save(engine.state(), state, {"step": str(until)})
        taken = f"{1e3 * (time.perf_counter() - start):.1f} ms, {state.stat().st_size / 1e3:.0f} kB"
        table.add_row("a snapshot", taken)
        engine = opt_30b(args.queries)
        start = time.perf_counter()
        steps = read_journal(path).steps
        snapshot = Snapshot(until, load(state)[0], None)
        restore(engine, Begun(path.parent, snapshots=(snapshot,), steps=steps), display)
        table.add_row(f"going on after {args.after} more", f"{time.perf_counter() - start:.2f} s")
    console.print(table)


if __name__ == "__main__":
    main()
