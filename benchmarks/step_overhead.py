"""Cost of a training step over the plain forward of the same sequences.

Times, interleaved in one process: a plain no-grad forward of the same 2Q·B sequences, the fused TeZO
step, the in-place TeZO step, and a MeZO-style step (dense normals, four in-place rewrites; written
here after arXiv 2305.17333, algorithm 1). Prints medians, spread, and ratios to the plain forward
taken within each round.

    python benchmarks/step_overhead.py
    python benchmarks/step_overhead.py --hidden 4096 --shapes 4x32 --only fused
    python benchmarks/step_overhead.py --hidden 128 --layers 1 --shapes 1x2 --only fused   fixed cost
    python benchmarks/step_overhead.py --sharding zero3 --ranks 2

With --sharding every rank has a batch of its own, "plain forward" is that of the same backend, and a time
is that of the slowest rank. MeZO's step is left out, as it needs whole weights.

The plain forward computes logits and loss at the same positions as the steps do. "All logits" is what
`model(**batch)` does by itself: comparing with it flatters the steps wherever few positions carry a
label.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from parts.common.backends import BACKENDS, batch_of, on_ranks, place, settle
from parts.common.machine import describe
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import tezo_ds
from tezo_ds.losses.objective import repeat

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ("16x64", "4x32")
FOR_SHARED = "processor: for a shared machine"
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def make_batch(shape: str, vocabulary: int, labels: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Draws random tokens, B x T, labelled at every position or, as in classification, at the last."""
    examples, length = map(int, shape.split("x"))
    ids = torch.randint(0, vocabulary, (examples, length), generator=torch.manual_seed(seed))
    wanted = ids.clone()
    if labels == "last":
        wanted[:, :-1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": wanted}


def mezo_step(
    engine: tezo_ds.Engine, batch: dict[str, torch.Tensor], directions: int, rho: float, lr: float
) -> None:
    """Makes one MeZO-SGD step for each direction on the matrices that `engine` trains."""
    parameters = dict(engine.sharding.module.named_parameters())
    weights = [parameters[matrix.name].data for matrix in engine.space.matrices]

    def move(seed: int, scale: float) -> None:
        generator = torch.Generator(weights[0].device).manual_seed(seed)
        for weight in weights:
            weight.add_(torch.empty_like(weight).normal_(generator=generator), alpha=scale)

    def loss() -> float:
        loss_sum, count = engine.objective(batch, 1)
        return (loss_sum / count).item()

    for seed in range(directions):
        move(seed, rho)
        plus = loss()
        move(seed, -2 * rho)
        minus = loss()
        move(seed, rho)
        move(seed, -lr * (plus - minus) / (2 * rho))


def random_llama(hidden: int, layers: int = 2) -> LlamaForCausalLM:
    """Makes a Llama of random weights: layers of Llama's proportions, and a small vocabulary."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers, num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def load(args: argparse.Namespace) -> PreTrainedModel:
    """Loads the model that the arguments name; the same on all ranks."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    if args.hidden:
        return random_llama(args.hidden, args.layers).to(dtype)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    return model


def low_rank_share(engine: tezo_ds.Engine, vocabulary: int) -> str:
    """Returns a line on the multiplications of low-rank terms over those of the layers, embeddings aside."""
    layers = [matrix for matrix in engine.space.matrices if matrix.shape[0] != vocabulary]
    extra = sum(matrix.rank * sum(matrix.shape) for matrix in layers)
    share = extra / sum(matrix.shape[0] * matrix.shape[1] for matrix in layers)
    return f"low-rank products: {share:.1%} of the layers' multiplications"


def contestants(args: argparse.Namespace, shape: str, rank: int) -> dict[str, Callable[[], object]]:
    """Returns the steps to time, by name; all on one model, which none of them changes for good."""
    loaded = load(args)
    vocabulary = loaded.config.vocab_size
    model = place(loaded, args.sharding)
    fields = {"rank": args.rank, "queries": args.queries, "lr": 1e-9, "exclude": args.exclude}
    fused = tezo_ds.initialize(model, {**fields, "probe": "fused"})
    inplace = tezo_ds.initialize(model, {**fields, "probe": "inplace"})
    if rank == 0:
        print(low_rank_share(fused, vocabulary))
    batch = make_batch(shape, vocabulary, args.labels, seed=batch_of(args.sharding, rank))
    inputs = fused.objective.inputs(repeat(batch, 2 * args.queries))

    def all_logits() -> None:
        with torch.no_grad():
            fused.sharding.forward(**inputs)

    steps: dict[str, Callable[[], object]] = {
        "plain forward": lambda: fused.objective(batch, 2 * args.queries),
        "plain, all logits": all_logits,
        "fused": lambda: fused.step(batch),
        "in-place": lambda: inplace.step(batch),
    }
    if args.sharding == "none":
        steps["MeZO-style"] = lambda: mezo_step(inplace, batch, args.queries, 1e-3, 0.0)
    if args.only:
        steps = {name: s for name, s in steps.items() if name in ("plain forward", *args.only)}
    return steps


def measure(
    steps: dict[str, Callable[[], object]], rounds: int, label: str, quiet: bool,
    clock: Callable[[], float] = time.perf_counter, before: int = 0,
) -> dict[str, list[float]]:  # fmt: skip
    """Times each contestant, in turn within each round and after `before` steps of its own that are not
    timed; two rounds of warm-up are dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in track(range(rounds + 2), label, console=Console(stderr=True, quiet=quiet)):
        for name, step in steps.items():
            for _ in range(before):
                step()
            settle()
            start = clock()
            step()
            settle()
            if turn >= 2:
                seconds[name].append(clock() - start)
    return seconds


def report(seconds: dict[str, list[float]], title: str) -> Table:
    """Makes a table of medians, 10–90 % spread, and ratio and difference to the plain forward as medians over
    rounds."""
    table = Table(
        "step", "median ms", "10–90 % ms", "÷ plain forward", "10–90 %", "− plain, ms", title=title
    )
    plain = seconds["plain forward"]
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, plain, strict=True)]
        more = statistics.median(value - base for value, base in zip(values, plain, strict=True))
        table.add_row(
            name, f"{statistics.median(values) * 1e3:.1f}", spread(values, 1e3, 1),
            f"{statistics.median(ratios):.3f}", spread(ratios, 1, 3), f"{more * 1e3:.1f}",
        )  # fmt: skip
    return table


def spread(values: list[float], scale: float, digits: int) -> str:
    """Returns where 10 and 90 % of the values lie."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return f"{low * scale:.{digits}f}–{high * scale:.{digits}f}"


def run(rank: int, args: argparse.Namespace) -> None:
    """Times every shape; rank 0 prints."""
    console = Console(quiet=rank > 0)
    console.print(describe())
    backend = "" if args.sharding == "none" else f", {args.sharding} on {args.ranks} ranks"
    for shape in args.shapes:
        steps, clock = contestants(args, shape, rank), CLOCKS[args.clock]
        seconds = measure(steps, args.rounds, shape, quiet=rank > 0, clock=clock)
        title = f"{shape} tokens, r={args.rank}, Q={args.queries}, {args.dtype}{backend}; {args.clock} time"
        console.print(report(seconds, title))


def arguments(description: str) -> argparse.ArgumentParser:
    """Makes a parser of what names a model, a batch and a step."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=str(ROOT / ".cache/quickstart/SmolLM2-135M-Instruct"))
    parser.add_argument("--hidden", type=int, help="random Llama layers of this size instead")
    parser.add_argument("--layers", type=int, default=2, help="how many, with --hidden")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="B x T, e.g. 16x64")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--labels", default="last", choices=["last", "all"])
    parser.add_argument("--exclude", nargs="*", default=[], help="glob patterns of frozen matrices")
    return parser


def main() -> None:
    parser = arguments(__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help=FOR_SHARED)
    parser.add_argument("--only", nargs="+", help="contestants to run besides the plain forward")
    parser.add_argument("--sharding", default="none", choices=BACKENDS)
    parser.add_argument("--ranks", type=int, default=2, help="processes of a sharded run")
    args = parser.parse_args()
    on_ranks(parser, args, run)


if __name__ == "__main__":
    main()
