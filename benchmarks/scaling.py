"""Weak and strong scaling of a step over ranks: ZeRO-3, FSDP2 and their hybrids, fused and in place.

    python benchmarks/scaling.py                      worlds of 1, 2, 4 … ranks on this machine, then the page
    python benchmarks/scaling.py --hidden 256 --layers 4 --worlds 1 2 --steps 3
    torchrun --nproc-per-node 8 benchmarks/scaling.py --shardings zero3 --global-batch 64 --append
    deepspeed --hostfile hosts benchmarks/scaling.py --shardings zero3 --global-batch 64 --append
    python benchmarks/scaling.py --report             only writes docs/scaling.md and its pictures

Under a launcher the launcher's world is the one that is measured, and --append keeps the rows of the worlds
before it. A step's time is that of the slowest rank, its parts are means over ranks; of all of these the
median over steps is given, and where 10 and 90 % of the steps lie. Peak memory is that of the rank that
takes most: on an accelerator what torch allocated, on the CPU what tensors take.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from parts.common.backends import spawn
from parts.common.machine import describe
from parts.methods.report import put_between_markers
from parts.scaling.measure import SHARDINGS, hosts, measure, misfit
from parts.scaling.report import MARKERS, draw, markdown, read, save
from rich.console import Console
from safetensors.torch import save_file
from step_overhead import ROOT, random_llama
from transformers.utils.logging import disable_progress_bar

from tezo_ds.sharding.world import join_world


def worlds_here() -> list[int]:
    """Returns 1, 2, 4 … up to the accelerators, or the cores, but to 4 at least: hybrids need four ranks."""
    here = len(os.sched_getaffinity(0))
    most = torch.accelerator.device_count() if torch.accelerator.is_available() else max(4, here)
    return [2**i for i in range(most.bit_length())]


def random_model(hidden: int, layers: int, dtype: str) -> str:
    """Makes a folder on this machine with a Llama of this size, of the same random weights everywhere."""
    folder = Path(tempfile.gettempdir()) / f"tezo-ds-scaling-{os.getuid()}"
    made = folder / f"llama-{hidden}x{layers}-{dtype}"
    if not (made / "config.json").exists():
        torch.manual_seed(0)
        beside = made.with_name(f"{made.name}.{os.getpid()}")
        model = random_llama(hidden, layers).to(getattr(torch, dtype))
        # Not by the model's save_pretrained, which in a world writes on one rank alone.
        model.config.save_pretrained(beside)
        save_file(model.state_dict(), beside / "model.safetensors", {"format": "pt"})
        try:
            beside.rename(made)
        except OSError:  # another has made it meanwhile
            shutil.rmtree(beside)
    return str(made)


def quiet() -> None:
    """Silences what libraries say on every rank."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)
    disable_progress_bar()


def use_device(threads: int) -> None:
    """Selects this rank's accelerator; on the CPU sets the number of threads."""
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(threads)


def run(rank: int, args: argparse.Namespace, shardings: Sequence[str]) -> None:
    """Measures in a world that is joined already; rank 0 keeps the rows after each sharding."""
    quiet()
    use_device(args.threads)
    for sharding in shardings:
        records = measure(sharding, args)
        if rank == 0:
            old = read(args.csv) if args.csv.exists() else []
            save(args.csv, old, [{**record, "command": args.command} for record in records])
            for r in records:
                print(
                    f"{r['mode']} {sharding} {r['probe']} on {r['world']}: {r['step_s']:.3f} s a step"
                )
        gc.collect()


def run_here(args: argparse.Namespace, console: Console) -> None:
    """Measures every world of this machine, each way of sharding in new processes."""
    for world in args.worlds:
        for sharding in args.shardings:
            if reason := misfit(sharding, world):
                console.print(f"left out: {reason}")
                continue
            spawn(world, "zero3", run, args, [sharding])  # which joins a world of one, too


def run_launched(args: argparse.Namespace) -> None:
    """Measures in the launcher's world. Raises SystemExit where a sharding does not fit the world."""
    join_world(deepspeed=True, fsdp=False, timeout=1800)
    use_device(args.threads)
    nodes = len(hosts(args.threads))
    for sharding in args.shardings:
        if reason := misfit(sharding, dist.get_world_size(), nodes):
            raise SystemExit(f"scaling: error: {reason}; leave it out of --shardings")
    run(dist.get_rank(), args, args.shardings)
    dist.destroy_process_group()


def arguments() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--worlds", nargs="+", type=int, help="ranks; by default 1, 2, 4 … as many as fit")
    add("--shardings", nargs="+", choices=SHARDINGS, default=list(SHARDINGS))
    add("--probes", nargs="+", choices=["fused", "inplace"], default=["fused", "inplace"])
    add("--modes", nargs="+", choices=["weak", "strong"], default=["weak", "strong"])
    add("--batch-size", type=int, default=2, help="examples a rank, of weak scaling")
    add("--global-batch", type=int, default=8, help="examples of all ranks, of strong scaling")
    add("--length", type=int, default=32, help="tokens of an example")
    add("--queries", type=int, default=1, help="directions a step")
    add("--rank", type=int, default=16, help="r")
    add("--include", nargs="+", default=["*"], help="what trains, as of tezo-ds train, e.g. last:6")
    add("--steps", type=int, default=9, help="that are timed")
    add(
        "--discard",
        type=int,
        default=2,
        help="steps before, as DeepSpeed learns the order of layers",
    )
    add("--threads", type=int, default=1, help="of a rank, where there is no accelerator")
    add(
        "--model",
        default=str(ROOT / ".cache/quickstart/SmolLM2-135M-Instruct"),
        help="folder or name",
    )
    add("--hidden", type=int, help="a random Llama of this hidden size (a multiple of 128) instead")
    add("--layers", type=int, default=2, help="of the random Llama")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--csv", type=Path, default=ROOT / "docs/scaling.csv", help="a row a measurement")
    add("--append", action="store_true", help="keep the rows that the CSV has")
    add("--page", type=Path, default=ROOT / "docs/scaling.md", help="where the tables go")
    add("--no-page", dest="page", action="store_const", const=None, help="no page and no pictures")
    add("--report", action="store_true", help="run nothing, report what the CSV has")
    add(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # of the deepspeed launcher
    return parser


def checked(words: Sequence[str] | None) -> argparse.Namespace:
    """Parses arguments, which fit each other and the world."""
    parser = arguments()
    args = parser.parse_args(words)
    args.launched = "RANK" in os.environ and not args.report
    if args.launched and args.worlds:
        parser.error("--worlds: the launcher sets the world; leave it out")
    args.worlds = [int(os.environ["WORLD_SIZE"])] if args.launched else args.worlds or worlds_here()
    odd = [world for world in args.worlds if args.global_batch % world]
    if "strong" in args.modes and odd:
        parser.error(
            f"--global-batch {args.global_batch}: {odd[0]} ranks do not divide it; choose a multiple, the "
            "same for all worlds that are to be compared"
        )
    if args.steps < 2 or args.discard < 2:
        parser.error("--steps and --discard: at least 2 each")
    args.command = " ".join(["python", *sys.argv])
    args.name = f"llama {args.hidden}x{args.layers}" if args.hidden else Path(args.model).name
    if args.include != ["*"]:  # rows of its own, compared with no others
        args.name += f", {' '.join(args.include)}"
    return args


def main(words: Sequence[str] | None = None) -> None:
    args, console = checked(words), Console(soft_wrap=True)
    quiet()
    first = os.environ.get("RANK", "0") == "0"
    if not args.report:
        if args.hidden:
            args.model = random_model(args.hidden, args.layers, args.dtype)
        if first and not args.append:
            args.csv.unlink(missing_ok=True)
        if args.launched:
            run_launched(args)
            return
        console.print(describe())
        run_here(args, console)
    try:
        records = read(args.csv) if args.csv.exists() else []
    except ValueError as error:
        raise SystemExit(f"scaling: error: {error}") from None
    content = markdown(records)
    console.print(content, markup=False)
    if args.page is not None:
        stem = args.page.stem
        pictures = (
            f"![Efficiency against ranks]({stem}-efficiency.png)\n\n"
            f"![Where the time of a step goes]({stem}-split.png)"
        )
        put_between_markers(args.page, f"{content}\n\n{pictures}", MARKERS)
        draw(records, args.page)


if __name__ == "__main__":
    main()
