"""Scaling beyond this machine, on paper: steps of large models on clusters of 8 to 1,024 GPUs.

    python benchmarks/scaling_model.py --calibrate docs/scaling.csv     the page, with what was measured
    python benchmarks/scaling_model.py --models opt-30b --gbit 3200 --no-count --no-page

Steps are those of `tezo-ds plan`: hops and bytes of rings, arithmetic at a stated rate. From the CSV of
benchmarks/scaling.py this machine's own constants are fitted, to see whether rings are what gathers take;
the GPUs' constants are stated. Two points are counted by the planner's dry run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from parts.common.machine import describe
from parts.methods.report import put_between_markers
from parts.scaling.report import read
from parts.scaling_model.calibration import calibration
from parts.scaling_model.counted import Line, compared
from parts.scaling_model.points import OURS, Point, job_at, points
from parts.scaling_model.report import (
    MARKERS,
    constants,
    counted,
    draw,
    limits,
    steps,
    stops,
    words,
)
from rich.console import Console
from step_overhead import ROOT

from tezo_ds.plan.dry_run import count
from tezo_ds.plan.hardware import GPUS, Cluster, gpu
from tezo_ds.plan.job import Sharded
from tezo_ds.plan.shapes import skeleton

NOT_CALIBRATED = (
    "**Not calibrated.** Measure first, then name the CSV: `python benchmarks/scaling.py`, "
    "`python benchmarks/scaling_model.py --calibrate docs/scaling.csv`."
)


def arguments() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--models", nargs="+", default=["opt-30b", "opt-66b", "opt-175b"], help="as of tezo-ds plan"
    )
    add(
        "--gbit",
        nargs="+",
        type=float,
        default=[400, 100],
        help="into a node, all adapters together",
    )
    add("--worlds", nargs="+", type=int, default=[2**i for i in range(3, 11)], help="GPUs")
    add("--per-node", type=int, default=8, help="GPUs")
    add("--gpu", choices=GPUS, default="h100-80g")
    add("--efficiency", type=float, default=0.5, help="share of the GPU's FLOPs that is reached")
    add("--examples", type=int, default=4, help="of a rank, in any world")
    add("--length", type=int, default=512, help="tokens of an example")
    add("--queries", type=int, default=1, help="directions of a rank (of MeZO: of all)")
    add("--include", nargs="+", default=["*"], help="what trains, as of tezo-ds plan, e.g. last:6")
    add(
        "--cached",
        action="store_true",
        help="steps whose examples' hidden states before the first layer that trains are cached",
    )
    add("--calibrate", type=Path, help="CSV of benchmarks/scaling.py")
    add("--no-count", dest="count", action="store_false", help="no dry runs")
    add("--page", type=Path, default=ROOT / "docs/scaling.md", help="where the tables go")
    add("--no-page", dest="page", action="store_const", const=None, help="no page and no pictures")
    return parser


def checked(words: Sequence[str] | None) -> argparse.Namespace:
    """Parses arguments, which fit each other."""
    parser = arguments()
    args = parser.parse_args(words)
    args.worlds = sorted(set(args.worlds))
    if len(args.worlds) < 2 or any(world % args.per_node for world in args.worlds):
        parser.error(f"--worlds: two or more, each of whole nodes of {args.per_node} GPUs")
    return args


def dry_runs(args: argparse.Namespace) -> list[tuple[str, list[Line]]]:
    """Dry-runs the first model on up to 8 nodes, one copy, and the last on all GPUs, a copy a node."""
    few = max(world for world in args.worlds if world <= max(8 * args.per_node, args.worlds[0]))
    runs: list[tuple[str, int, Sharded]] = [
        (args.models[0], few, "zero3"),
        (args.models[-1], args.worlds[-1], "fsdp2-hybrid"),
    ]
    found = []
    for name, world, sharding in runs:
        job = job_at(skeleton(name, "bfloat16"), args, world, args.gbit[0])
        job = replace(job, sharding=sharding)
        found.append((f"{name} on {world:,} GPUs, {sharding}", compared(job, count(job))))
    return found


def _trained(args: argparse.Namespace) -> str:
    """Says what of this engine's models trains, where that is not all."""
    if args.include == ["*"]:
        return ""
    trunk = "cached" if args.cached else "run once for all branches"
    return f"; this engine trains {', '.join(args.include)}, with the layers before {trunk}"


def page(args: argparse.Namespace, found: Sequence[Point]) -> str:
    """Returns the text between the page's markers."""
    chip = gpu(args.gpu)
    cluster = Cluster(chip, args.worlds[-1], args.per_node, efficiency=args.efficiency)
    ends = limits(found, chip.nvlink)
    fit = calibration(read(args.calibrate)) if args.calibrate else NOT_CALIBRATED
    setting = (
        f"{args.per_node} GPUs a node, {args.examples} examples of {args.length} tokens a rank in any world "
        f"(weak scaling), Q = {args.queries} a rank{_trained(args)}"
    )
    ways = "; ".join(f"*{way}*: {where}" for way, where in OURS.items())
    parts = [
        f"At {describe()}.",
        "### Rings on this machine: measured against modelled", fit,
        "### What is stated of GPUs", constants(args.gpu, chip, cluster),
        "### Steps, modelled",
        f"**All numbers of these tables are modelled.** {setting}. {ways}. "
        "Efficiency is tokens/s and GPU, over those of the smallest world of the same way that fits. MeZO "
        "and Adam are under ZeRO-3.",
    ]  # fmt: skip
    for name in args.models:
        parts += [f"#### {name}", steps(found, name)]
    parts += [
        "### Where each stops, modelled",
        "**All numbers are modelled**, at the largest world where no other is named.",
        stops(ends), words(ends, chip),
    ]  # fmt: skip
    if args.count:
        parts += [
            "### Traffic, counted",
            "The engine's own step on tensors without values, `tezo-ds plan --dry-run`.",
            counted(dry_runs(args)),
        ]
    return "\n\n".join(parts)


def main(words: Sequence[str] | None = None) -> None:
    args, console = checked(words), Console(soft_wrap=True, highlight=False)
    try:
        found = [point for name in args.models for point in points(name, args)]
        content = page(args, found)
    except (OSError, ValueError) as error:  # ConfigError is one
        raise SystemExit(f"scaling_model: error: {error}") from None
    console.print(content, markup=False)
    if args.page is not None:
        stem = args.page.stem
        pictures = (
            f"![Seconds of a step against GPUs, modelled]({stem}-model-step.png)\n\n"
            f"![Tokens a second against GPUs, modelled]({stem}-model-tokens.png)"
        )
        put_between_markers(args.page, f"{content}\n\n{pictures}", MARKERS)
        draw(found, args.page)


if __name__ == "__main__":
    main()
