"""Training steps of a model that is larger than the memory: its weights stay in their files.

    python benchmarks/larger_than_memory.py --folder /big/disk/random-13b
    python benchmarks/larger_than_memory.py --model llama-30b --folder /big/disk/random-30b --pages ahead
    python benchmarks/larger_than_memory.py --folder /big/disk/random-13b --include last:8 --pages kernel

One process on the CPU takes whole TeZO steps (fused probe, all matrices) on random tokens. TeZO never
writes a weight, so `load_model` maps the checkpoint's files and weights are read as each layer needs
them. Each way runs in a process of its own, after the files have left the page cache:

- kernel: what stays in memory is the kernel's choice; it takes whatever memory is free.
- ahead: `mapped_weights.read_ahead` reads the next block while one computes, and drops it after.
- memory: weights are copied into memory at the start; for models that fit.

With --include late layers train alone. All steps are then of one batch: a plain one, whose branches run all
layers, one that fills the cache of hidden states, and cached ones. Before each, all pages of the files are
given back, so that what a step reads is seen by what is in memory after it, and by bytes from the disk.

--folder is a checkpoint, which is left as it is; or a new folder, for which random weights are drawn (see
random_checkpoint.py) and which is deleted at the end unless --keep.
"""

from __future__ import annotations

import argparse
import json
import mmap
import shutil
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from parts.common.apart import found_apart
from parts.common.machine import describe
from parts.common.tables import markdown_table
from parts.larger_than_memory.mapped_weights import (
    extents,
    give_back,
    pages_of,
    read_ahead,
)
from parts.larger_than_memory.random_checkpoint import leave_cache, write_random
from parts.methods.report import put_between_markers
from step_overhead import ROOT, make_batch
from transformers import PreTrainedModel

import tezo_ds
from tezo_ds.errors import ConfigError, TezoError
from tezo_ds.models.loading import load_model
from tezo_ds.plan.shapes import skeleton
from tezo_ds.trunk.trunk import EXAMPLE_IDS

PAGES = ("kernel", "ahead", "memory")
PAGE = ROOT / "docs" / "larger-than-memory.md"
EVERY = 0.02  # seconds between two looks at the memory
RATE = 1e-6
PEAKS = (
    "pages",
    "anonymous GB",
    "of files GB",
    "together GB",
    "GB read by loading",
    "s",
    "factors s",
)
STEPS = ("pages", "step", "s", "GB read", "GB/s", "tokens", "loss", "κ", "max abs a")
VISITS = ("pages", "step", "s", "GB read", "GB in memory after", "pages after", "of the weights")

Record = dict[str, Any]


class Peaks:
    """Context manager: peak bytes of this process inside, by kind: `anonymous` is what the process needs,
    `file` are pages of files, which the kernel can drop, both seen every `EVERY` seconds; `total` is the
    kernel's own and exact."""

    def __init__(self) -> None:
        self.anonymous = self.file = self.total = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        ended = False
        while not ended:
            ended = self._end.wait(EVERY)
            now = _numbers("/proc/self/status", 1024)
            self.anonymous = max(self.anonymous, now["RssAnon"])
            self.file = max(self.file, now["RssFile"])
            self.total = now["VmHWM"]


def train(
    folder: Path, pages: str, steps: int, shape: str, rank: int, include: str | None = None
) -> Record:
    """Trains some steps, each on a batch of its own; with `include` one more, and all on the same batch.

    Args:
        folder: a checkpoint.
        pages: one of PAGES.
        steps: how many.
        shape: shape of a batch, B x T.
        rank: r.
        include: what trains, where that is late layers alone: a first step is plain, the others cache.

    Returns:
        seconds of loading and of drawing factors; of each step its seconds, bytes read from the disk, loss,
        κ, tokens and the largest coefficient after it, with `include` also the bytes of the files that are
        in memory after it; peaks of memory, bytes.

    Raises:
        ConfigError: the weights are not mapped.
    """
    with Peaks() as peaks:
        start, before = time.perf_counter(), _bytes_read()
        model = cast(PreTrainedModel, load_model(str(folder)))
        if pages == "memory":
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        else:
            extents(model)
        loaded, read = time.perf_counter(), _bytes_read() - before
        fields = {"rank": rank, "lr": RATE, "probe": "fused", "check_every": 0}
        turns = _turns(model, fields, steps, include)
        drawn, taken = time.perf_counter(), []
        with read_ahead(turns[-1][0]) if pages == "ahead" else nullcontext():
            for engine, kind in turns:
                if kind and pages == "kernel":
                    give_back(model)
                batch = make_batch(
                    shape, model.config.vocab_size, "all", seed=0 if kind else engine.step_index
                )
                step = _step(engine, batch)
                if kind:
                    step |= {"kind": kind, "pages": pages_of(folder, "Rss")}
                taken.append(step)
    return {
        "pages": pages, "load_seconds": loaded - start, "load_read": read, "factor_seconds": drawn - loaded,
        "weights": sum(p.nbytes for p in model.parameters()), "steps": taken,
        "numel": sum(p.numel() for p in model.parameters()), "anonymous": peaks.anonymous,
        "file": peaks.file, "total": peaks.total,
    }  # fmt: skip


def _turns(
    model: PreTrainedModel, fields: Record, steps: int, include: str | None
) -> list[tuple[tezo_ds.Engine, str]]:
    """Returns the engine of each step and, with `include`, the step's kind."""
    if include is None:
        return [(tezo_ds.initialize(model, fields), "")] * steps
    fields = {**fields, "include": [include]}
    plain = tezo_ds.initialize(model, {**fields, "shared_trunk": False})
    cached = tezo_ds.initialize(model, {**fields, "trunk_cache": "memory"})
    return [(plain, "plain"), (cached, "first"), *[(cached, "cached")] * (steps - 1)]


def _step(engine: tezo_ds.Engine, batch: dict[str, torch.Tensor]) -> Record:
    if engine.config.trunk_cache != "off":
        batch = {**batch, EXAMPLE_IDS: torch.arange(len(batch["input_ids"]))}
    before = _bytes_read()
    report = engine.step(batch)
    step = {
        "seconds": report.seconds, "read": _bytes_read() - before,
        "loss": report.loss, "kappa": list(report.kappa), "tokens": report.tokens,
        "largest": max(a.abs().max().item() for a in engine.coefficients().values()),
    }  # fmt: skip
    print(json.dumps(step), file=sys.stderr, flush=True)
    return step


def _bytes_read() -> int:
    return _numbers("/proc/self/io", 1)["read_bytes"]


def _numbers(file: str, unit: int) -> dict[str, int]:
    """Reads the lines of a file of /proc that hold a number."""
    lines = (line.split() for line in Path(file).read_text().splitlines())
    return {line[0][:-1]: int(line[1]) * unit for line in lines if line[1:] and line[1].isdigit()}


def in_new_process(args: argparse.Namespace, pages: str) -> Record:
    """Runs `train` in a new process, from a cold page cache."""
    for file in args.folder.glob("*.safetensors"):
        leave_cache(file)
    record: Record = found_apart(__file__, *sys.argv[1:], "--one", pages)
    print(json.dumps(record), file=sys.stderr, flush=True)  # another way may fail later
    return record


def markdown(records: list[Record], command: str, setting: str) -> str:
    """Makes two tables: peaks of each way, and its steps."""
    first = records[0]
    memory = _numbers("/proc/meminfo", 1024)
    peaks = [
        [r["pages"], *(f"{r[kind] / 1e9:.2f}" for kind in ("anonymous", "file", "total", "load_read")),
         f"{r['load_seconds']:.1f}", f"{r['factor_seconds']:.1f}"]
        for r in records
    ]  # fmt: skip
    visits = any("kind" in step for step in first["steps"])
    return "\n\n".join([
        f"`{command}`",
        f"{first['numel'] / 1e9:.2f} billion weights, {first['weights'] / 1e9:.2f} GB; the machine has "
        f"{memory['MemTotal'] / 1e9:.2f} GB of memory and {memory['SwapTotal'] / 1e9:.2f} of swap. {setting}",
        f"Measured on: {describe()}.",
        markdown_table(PEAKS, peaks),
        markdown_table(VISITS, _visits(records)) if visits else markdown_table(STEPS, _steps(records)),
    ])  # fmt: skip


def _steps(records: list[Record]) -> list[list[str]]:
    return [
        [r["pages"], str(number), f"{s['seconds']:.1f}", f"{s['read'] / 1e9:.2f}",
         f"{s['read'] / 1e9 / s['seconds']:.2f}", str(s["tokens"]), f"{s['loss']:.4f}",
         ", ".join(f"{k:.4g}" for k in s["kappa"]), f"{s['largest']:.3g}"]
        for r in records
        for number, s in enumerate(r["steps"], start=1)
    ]  # fmt: skip


def _visits(records: list[Record]) -> list[list[str]]:
    return [
        [r["pages"], s["kind"], f"{s['seconds']:.1f}", f"{s['read'] / 1e9:.3f}",
         f"{s['pages'] / 1e9:.3f}", f"{s['pages'] // mmap.PAGESIZE:,}",
         f"{s['pages'] / r['weights']:.1%}"]
        for r in records
        for s in r["steps"]
    ]  # fmt: skip


def markers(folder: Path) -> tuple[str, str]:
    """Returns the lines of a page between which a checkpoint's tables stand."""
    line = f"<!-- benchmarks/larger_than_memory.py, {folder.name}: {{}} -->"
    return line.format("begin"), line.format("end")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="llama-13b", help="a name that `tezo-ds plan` knows, or a config.json")
    add("--folder", type=Path, required=True, help="a checkpoint, or where to write a random one")
    add("--keep", action="store_true", help="the weights that were written")
    add("--steps", type=int, default=3)
    add("--shape", default="2x16", help="examples x tokens of a batch; a step has two such in it")
    add("--rank", type=int, default=16)
    add(
        "--include",
        help="late layers that train, e.g. last:8, with a cache of the hidden states before",
    )
    add("--pages", nargs="+", choices=PAGES, default=["ahead"])
    add(
        "--page",
        type=Path,
        help=f"to write the tables into, e.g. {PAGE.relative_to(ROOT)}; it needs two lines for them, "
        f"{' and '.join(markers(Path('NAME')))}, with the name of --folder",
    )
    add("--one", choices=PAGES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.one:
        given = args.folder, args.one, args.steps, args.shape, args.rank, args.include
        print(json.dumps(train(*given)))
        return
    new = not args.folder.exists()
    try:
        setting = f"Batches of {args.shape} random tokens, Q = 1, r = {args.rank}, bfloat16."
        if new:
            start = time.perf_counter()
            write_random(cast(PreTrainedModel, skeleton(args.model, "auto")), args.folder)
            setting += f" The weights were written in {time.perf_counter() - start:.0f} s."
        elif not (args.folder / "config.json").is_file():
            raise ConfigError(
                f"--folder {args.folder}: is there, and is no checkpoint; name a new one"
            )
        records = [in_new_process(args, pages) for pages in args.pages]
    except TezoError as error:
        sys.exit(f"error: {error}")
    finally:
        if new and not args.keep:
            shutil.rmtree(args.folder, ignore_errors=True)
    command = " ".join(["python benchmarks/larger_than_memory.py", *sys.argv[1:]])
    text = markdown(records, command, setting)
    print(text)
    if args.page:
        put_between_markers(args.page, text, markers(args.folder))


if __name__ == "__main__":
    main()
