"""One prepared check of everything that a CPU cannot show: one GPU, no network, 8 minutes.

    python benchmarks/gpu_check.py --out DIR       prints a short table last, and writes DIR/gpu.json
    python benchmarks/gpu_check.py --out DIR --parts bits speed
    python benchmarks/gpu_check.py --report gpu.json          writes docs/gpu-status.md's table from it

Each part is a process with a time limit, and each row in it has a try of its own, so that one failure
hides no other: rows that were there when a part's time was over stay. The exit code is 1 if a row failed or
a part did not come to its end. --toy, the default where there is no GPU, has the same rows at small sizes.

    bits         random numbers, repeated losses, a killed run, ZeRO-3 and FSDP2 of one rank
    speed        a step over a plain forward at the sizes of Llama-2-7B, OPT-13B and LLaMA-30B, in bfloat16
    forward      steps whose blocks are compiled, and recorded; rows of examples end to end, without padding
    learning     four methods on TREC for as many seconds each, all at once
    generation   tokens a second with a run's coefficients applied
    quantised    slopes and steps beside weights of 4 and 8 bits, of the libraries that are there

benchmarks/gpu_bundle.sh packs what a bare machine lacks; docs/gpu-status.md says how to run it there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from parts.common.machine import describe
from parts.gpu_check import bits, learning
from parts.gpu_check.report import MARKERS, markdown, table
from parts.gpu_check.rows import FAILED, Options, Row, Rows, read
from parts.methods.report import put_between_markers
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
# Seconds, at most.
PARTS = {
    "bits": 85, "speed": 160, "forward": 60, "learning": 105, "generation": 40, "quantised": 30,
}  # fmt: skip


def check(args: argparse.Namespace, console: Console) -> list[Row]:
    """Runs the parts, one after the other, and returns their rows."""
    rows: list[Row] = []
    for part in args.parts:
        path, start = args.out / f"{part}.jsonl", time.perf_counter()
        path.unlink(missing_ok=True)
        words = [sys.executable, __file__, "--part", part, "--out", str(args.out)]
        words += [
            "--model",
            str(args.model),
            "--data",
            str(args.data),
            "--seconds",
            str(args.seconds),
        ]
        words += ["--toy"] * args.toy
        with (args.out / f"{part}.log").open("w") as log:
            process = subprocess.Popen(
                words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code: int | None = process.wait(PARTS[part] * args.patience)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
                code = None
        rows += read(path)
        taken = time.perf_counter() - start
        if code != 0:
            why = (
                f"was ended after {taken:.0f} s" if code is None else f"ended with exit code {code}"
            )
            rows.append(
                Row(part, "all of it", FAILED, f"{why}; see {part}.log", seconds=round(taken, 1))
            )
        console.print(f"{part}: {sum(row.part == part for row in rows)} rows in {taken:.0f} s")
    return rows


def one_part(args: argparse.Namespace) -> None:
    """Runs one part in this process."""
    args.out.mkdir(parents=True, exist_ok=True)
    module = importlib.import_module(f"parts.gpu_check.{args.part}")
    module.run(Rows(args.part, args.out / f"{args.part}.jsonl"), Options.of(args))


def arguments() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "runs/gpu-check", help="folder of gpu.json and of logs")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--model", type=Path, default=ROOT / ".cache/quickstart/SmolLM2-135M-Instruct")
    add("--data", type=Path, default=ROOT / ".cache/quickstart/trec")
    add("--seconds", type=float, default=60.0, help="of training of each method")
    add("--patience", type=float, default=1.0, help="times the limits of the parts")
    add("--toy", action="store_true", default=not torch.accelerator.is_available())
    add(
        "--report",
        type=Path,
        metavar="GPU.JSON",
        help="write the page's table from a run; check nothing",
    )
    add("--page", type=Path, default=ROOT / "docs/gpu-status.md")
    add(
        "--part", choices=PARTS, help=argparse.SUPPRESS
    )  # what the processes that are started are told
    add("--stretch", nargs=3, help=argparse.SUPPRESS)
    add("--learn", nargs=2, help=argparse.SUPPRESS)
    return parser


def main(words: Sequence[str] | None = None) -> int:
    args = arguments().parse_args(words)
    if args.stretch:
        bits.stretch(Path(args.stretch[0]), int(args.stretch[1]), bool(int(args.stretch[2])))
        return 0
    if args.learn:
        learning.learn(Options.of(args), args.learn[0], int(args.learn[1]))
        return 0
    if args.part:
        one_part(args)
        return 0
    if args.report:
        put_between_markers(args.page, markdown(json.loads(args.report.read_text())), MARKERS)
        return 0
    console = Console(soft_wrap=True, width=140)
    args.out.mkdir(parents=True, exist_ok=True)
    machine, start = describe(), time.perf_counter()
    console.print(f"{machine}{'; toy sizes' if args.toy else ''}")
    rows = check(args, console)
    found = {
        "machine": machine, "toy": args.toy, "seconds": round(time.perf_counter() - start, 1),
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    (args.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    console.print(table(rows))
    failed = sum(row.status == FAILED for row in rows)
    console.print(f"{failed} failed; all of it is in {args.out / 'gpu.json'}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
