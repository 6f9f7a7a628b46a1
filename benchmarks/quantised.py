"""Training beside quantised weights, on what a CPU runs of it: slopes, rounding in place, cost, learning.

SmolLM2-135M-Instruct on TREC's questions, one thread. Forms are those of `--load-in`; int4 is torchao's
integers of 4 bits with a scale for each 64, which on a CPU lie in a byte each.

    slopes    κ of the fused probe beside packed weights, against the same directions of a float64 model that
              holds the dequantised weights, and against those of the model in full precision
    rounding  the same directions put into the weights, which are then quantised again, as MeZO's loop would
    cost      a step over a plain forward of the same quantised model, and bytes of its weights
    learning  accuracy after equal steps from the same seeds

    python benchmarks/quantised.py                                   an hour or so
    python benchmarks/quantised.py --parts slopes rounding           minutes
    python benchmarks/quantised.py --parts learning --seeds 3 --steps 400
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from parts.common.machine import describe
from parts.methods.data import load_splits
from parts.methods.training import Settings, Trainer, Weights
from rich.console import Console
from rich.table import Table
from step_overhead import make_batch, measure, random_llama, report
from torch import Tensor, nn
from transformers import AutoTokenizer

import tezo_ds
from tezo_ds.directions.draws import dense
from tezo_ds.directions.space import Matrix
from tezo_ds.models.loading import load_model
from tezo_ds.quantised.packed import packed_weights
from tezo_ds.tasks import collate, encode

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("slopes", "rounding", "cost", "learning")
FORMS = ("int8", "int4", "4bit", "8bit")


def loaded(args: argparse.Namespace, form: str | None, dtype: str) -> nn.Module:
    """Loads the model, quantised to a form; None: not at all."""
    return load_model(str(ROOT / args.model), dtype, load_in=form).eval()


def unpacked(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replaces packed layers by plain ones that hold the dequantised weights, all in another dtype."""
    for weight in packed_weights(model).values():
        m, n = weight.shape
        plain = nn.Linear(n, m, bias=False, dtype=dtype)
        plain.weight.data.copy_(weight.dequantised())
        model.set_submodule(weight.path, plain)
    return nn.Module.to(model, dtype)  # its own refuses, as it was quantised once


def batch_of(args: argparse.Namespace, examples: int) -> dict[str, Tensor]:
    """Returns training examples of TREC as a batch."""
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / args.model))
    task = load_splits("trec", args.cache, 8, 8)
    return collate(encode(tokenizer, task.train[:examples], 48), int(tokenizer.pad_token_id))


def fields_of(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Returns the config by which slopes are measured."""
    return {
        "rank": args.rank, "rho": args.rho, "queries": args.queries, "include": tuple(args.include),
        "lr": 0.0, "branch_chunk": 4, **more,
    }  # fmt: skip


def kappas(model: nn.Module, args: argparse.Namespace, batch: dict[str, Tensor]) -> Tensor:
    """Returns κ of the first step's directions: float64 (Q,). All models have the same directions, rounded to
    their own dtype."""
    engine = tezo_ds.initialize(model, fields_of(args))
    return torch.tensor(engine.step(batch).kappa, dtype=torch.float64)


def apart(found: Tensor, wanted: Tensor) -> str:
    """Returns the root mean square of a difference over that of what is wanted, and the correlation."""
    difference = float((found - wanted).norm() / wanted.norm())
    agreement = float(torch.corrcoef(torch.stack([found, wanted]))[0, 1])
    return f"{difference:.2%}, {agreement:.4f}"


def slopes(args: argparse.Namespace, console: Console) -> None:
    """Prints how far κ beside packed weights is from κ of models without any kernels or rounding."""
    batch = batch_of(args, args.examples)
    full = kappas(loaded(args, None, "float32").double(), args, batch)
    table = Table(
        "weights", "activations", "κ against its own in float64", "κ against full precision's",
        title=f"difference (rms) and correlation of {args.queries} slopes, {args.examples} questions",
    )  # fmt: skip
    for form in (None, *args.forms):
        for dtype in args.dtypes:
            # Of each dtype its own, as scales are of the dtype, too.
            own = kappas(unpacked(loaded(args, form, dtype), torch.float64), args, batch)
            found = kappas(loaded(args, form, dtype), args, batch)
            cells = form or "plain", dtype, apart(found, own), apart(found, full)
            console.print(*cells, sep="; ")  # those that are there, should it be ended
            table.add_row(*cells)
            gc.collect()
    console.print(table)


def steps_of(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Returns, of weights that are torchao's integers, what one unit is, (m, n), and the largest integer."""
    found = {}
    for name, weight in packed_weights(model).items():
        held: Any = weight.module.weight
        scale = held.scale.view(len(held), -1).float()
        low = int(held.qdata.min())
        unit = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
        found[name] = unit, 7 if low >= -8 else 127
    return found


def changes_of(kind: str, matrix: Matrix, rho: float, direction: int) -> Tensor:
    """Returns ρZ of a matrix: TeZO's, of low rank, or MeZO's dense one."""
    if kind == "TeZO":
        U, V = tezo_ds.factors(matrix.name, matrix.shape, matrix.rank, 0)
        tau = tezo_ds.tau(matrix.name, matrix.rank, 0, 0, direction)
        return rho * (U * tau) @ V.t()
    rows, columns = torch.arange(matrix.shape[0]), range(matrix.shape[1])
    return rho * dense(matrix.name, 0, 0, direction, rows, columns)


@torch.no_grad()
def rounding(args: argparse.Namespace, console: Console) -> None:
    """Prints what is left of ±ρZ in weights that are rounded to the integers again, and of the slopes."""
    batch = batch_of(args, args.examples)
    title = f"Ŵ ± ρZ in place, ρ = {args.rho:g}, rounded again to its grid; {args.queries} slopes"
    columns = (
        "weights",
        "Z",
        "integers that change",
        "of ρZ that arrives",
        "κ against that unrounded",
    )
    table = Table(*columns, title=title)
    for form in [form for form in args.forms if form in ("int8", "int4")]:
        model = loaded(args, form, "float32")
        grid = steps_of(model)
        model = unpacked(model, torch.float32)
        engine = tezo_ds.initialize(model, fields_of(args))
        for kind in ("TeZO", "MeZO"):
            found = Rounded(model, engine, grid, batch, args.rho)
            rounded, exact = found.slopes(kind, args.queries)
            table.add_row(
                form, kind, f"{found.changed / found.total:.2%}", f"{found.arrived / found.sent:.2%}",
                apart(rounded, exact),
            )  # fmt: skip
    console.print(table)


class Rounded:
    """A dequantised model whose perturbed weights are rounded to their grid again."""

    def __init__(
        self, model: nn.Module, engine: tezo_ds.Engine, grid: dict[str, tuple[Tensor, int]],
        batch: dict[str, Tensor], rho: float,
    ) -> None:  # fmt: skip
        self._engine, self._grid, self._batch, self._rho = engine, grid, batch, rho
        self._parameters = dict(model.named_parameters())
        self.changed = self.total = 0
        self.arrived = self.sent = 0.0

    def slopes(self, kind: str, queries: int) -> tuple[Tensor, Tensor]:
        """Returns κ with rounding and without: float64 (Q,) each."""
        both = []
        for direction in range(queries):
            plus, minus = (self._losses(kind, direction, sign) for sign in (1, -1))
            both.append([(p - m) / (2 * self._rho) for p, m in zip(plus, minus, strict=True)])
        rounded, exact = torch.tensor(both, dtype=torch.float64).t()
        return rounded, exact

    def _losses(self, kind: str, direction: int, sign: int) -> tuple[float, float]:
        """Returns the loss at Ŵ + sign ρZ, rounded to the grid and not."""
        matrices, losses = self._engine.space.matrices, []
        kept = {m.name: self._parameters[m.name].data.clone() for m in matrices}
        for rounds in (True, False):
            for matrix in matrices:
                change = sign * changes_of(kind, matrix, self._rho, direction)
                moved = kept[matrix.name] + change
                if rounds:
                    unit, most = self._grid[matrix.name]
                    moved = (moved / unit).round().clamp(-most - 1, most) * unit
                    step = moved - kept[matrix.name]
                    self.changed += int((step.abs() > unit / 2).sum())
                    self.total += step.numel()
                    self.arrived += float((step * change).sum())
                    self.sent += float(change.square().sum())
                self._parameters[matrix.name].data.copy_(moved)
            loss_sum, count = self._engine.objective(self._batch, 1)
            losses.append((loss_sum / count).item())
        for matrix in matrices:
            self._parameters[matrix.name].data.copy_(kept[matrix.name])
        return losses[0], losses[1]


def cost(args: argparse.Namespace, console: Console) -> None:
    """Prints steps over plain forwards, and bytes of weights, of random Llama layers."""
    folder = ROOT / "runs/quantised-model"
    torch.manual_seed(0)
    random_llama(args.hidden).bfloat16().save_pretrained(folder)
    batch = make_batch(args.shape, 1024, "last")
    for form in (None, *args.forms):
        model = load_model(str(folder), args.dtypes[0], load_in=form).eval()
        engine = tezo_ds.initialize(model, {"rank": args.rank, "lr": 1e-9})
        steps: dict[str, Callable[[], object]] = {
            "plain forward": functools.partial(engine.objective, batch, 2),
            "fused step": functools.partial(engine.step, batch),
        }
        label = form or f"plain {args.dtypes[0]}"
        seconds = measure(steps, args.rounds, label, quiet=True, clock=time.process_time)
        title = f"{label}, hidden {args.hidden}, {args.shape} tokens; {_bytes(model)}"
        console.print(report(seconds, title))


def _bytes(model: nn.Module) -> str:
    packed = packed_weights(model).values()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)][:-1]
    numel = sum(m.in_features * m.out_features for m in layers)
    held = sum(weight.nbytes for weight in packed) or sum(m.weight.nbytes for m in layers)
    return f"layers {held / 2**20:.1f} MiB, {8 * held / numel:.2f} bits a weight"


class Read(Weights):
    """Weights of a model that nothing writes, which need no copy."""

    def __init__(self) -> None:
        """Keeps nothing."""

    def put_back(self) -> None:
        """Has nothing to put back."""


def learning(args: argparse.Namespace, console: Console) -> None:
    """Prints accuracy on test examples after equal steps of tezo-adam-coef, by form and seed."""
    task = load_splits("trec", args.cache, args.test_examples, args.test_examples)
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / args.model))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    settings = Settings(
        0.0, 8, 800, args.test_examples, args.test_examples, include=tuple(args.learns),
        rank=args.rank, rho=args.rho,
    )  # fmt: skip
    seeds = range(1, args.seeds + 1)
    title = f"TREC, accuracy on {args.test_examples} after {args.steps} steps, lr {args.lr:g}"
    table = Table(
        "weights", "before", *(f"seed {seed}" for seed in seeds), "mean", "mean loss", title=title
    )
    for form in (None, *args.forms):
        model: Any = loaded(args, form, args.dtypes[0])
        trainer = Trainer(model, tokenizer, task, settings, Read())
        before = trainer.judge("final").accuracy
        found, losses = [], []
        for seed in seeds:
            run = trainer.run("tezo-adam-coef", args.lr, seed, "final", args.steps)
            found.append(run.accuracy)
            losses.append(math.nan if run.loss is None else run.loss)
            name = form or "plain"
            console.print(f"{name}, seed {seed}: {run.accuracy:.1%}, {run.seconds:.0f} s")
        mean = f"{sum(found) / len(found):.1%}", f"{sum(losses) / len(losses):.3f}"
        cells = [f"{accuracy:.1%}" for accuracy in (before, *found)]
        table.add_row(form or f"plain {args.dtypes[0]}", *cells, *mean)
    console.print(table)


def arguments() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--forms", nargs="*", choices=FORMS, default=list(FORMS), help="beside plain weights")
    add(
        "--dtypes",
        nargs="+",
        default=["float32", "bfloat16"],
        help="of the activations; the first trains",
    )
    add(
        "--include",
        nargs="+",
        default=["*_proj*"],
        help="globs, of the layers whose slopes are measured",
    )
    add(
        "--learns",
        nargs="+",
        default=["model.layers.2[4-9].*v_proj*"],
        help="globs, of the layers that learn",
    )
    add("--rank", type=int, default=16)
    add("--rho", type=float, default=1e-3)
    add("--queries", type=int, default=16, help="slopes to compare")
    add("--examples", type=int, default=8)
    add("--hidden", type=int, default=2048)
    add("--shape", default="4x32", help="B x T of --parts cost")
    add("--rounds", type=int, default=9)
    add("--steps", type=int, default=400)
    add("--seeds", type=int, default=3)
    add("--lr", type=float, default=2e-3)
    add("--test-examples", type=int, default=200)
    add("--model", default=".cache/quickstart/SmolLM2-135M-Instruct")
    add("--cache", type=Path, default=ROOT / ".cache/methods", help="of the data")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    args = arguments().parse_args(words)
    torch.set_num_threads(1)
    console = Console(soft_wrap=True, width=120)
    console.print(describe())
    for part in args.parts:
        {"slopes": slopes, "rounding": rounding, "cost": cost, "learning": learning}[part](
            args, console
        )
        console.file.flush()


if __name__ == "__main__":
    main()
