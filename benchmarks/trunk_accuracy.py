"""Accuracy after the same processor seconds: all layers trained, the last 12, the last 6, the last 6 cached.

SmolLM2-135M-Instruct on two tasks (see parts/methods/data.py), one method, one thread. Each way trains for
as many steps as fit into the budget, which counts processor seconds of the steps alone (the first, which
finds the trunk, and filling the cache included), so a busy machine changes little. Each way tries as many
learning rates, with one seed and the full budget, judged by the loss on validation examples; the best then
trains from other seeds (of directions, data order and training subset) and is judged on test examples.

    python benchmarks/trunk_accuracy.py                       all; some 100 processor minutes
    python benchmarks/trunk_accuracy.py --tasks trec --budget 30
    python benchmarks/trunk_accuracy.py --report              runs nothing, prints what there is

A finished run is a line in --out; the same command goes on from there. Rates to try lie half a decade
apart around the method's own (benchmarks/methods.py) times √(layers / trained layers), so that a step of
Adam moves the model as far.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from methods import SCALE
from parts.common.machine import describe
from parts.methods.data import TASKS, load_splits
from parts.methods.report import MOST_SEEDS, Record, Results, best_rate, interval
from parts.methods.training import SEEDS_APART, Outcome, Settings, Trainer, Weights, tezo_fields
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from tezo_ds.errors import ProbeError
from tezo_ds.tasks import batch_indices, collate, encode
from tezo_ds.trunk.trunk import EXAMPLE_IDS

ROOT = Path(__file__).resolve().parent.parent
TUNING_SEED = 0  # the final ones are 1, 2, …
COLUMNS = ("layers", "lr", "acc. %", "± 95 %", "loss", "± 95 %", "vs all", "seeds", "steps", "s")


@dataclass(frozen=True)
class Way:
    """A choice of layers to train: the last of them; None: all."""

    late: int | None = None
    cached: bool = False

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return "all" if self.late is None else f"last {self.late}" + ", cached" * self.cached

    def fields(self, layers: int) -> dict[str, Any]:
        """Returns the fields of a config that leave other layers frozen."""
        first = 0 if self.late is None else layers - self.late
        frozen = {"exclude": (f"layers:0-{first - 1}",)} if first else {}
        return {**frozen, "trunk_cache": "memory"} if self.cached else dict(frozen)


def ways_of(words: Sequence[str]) -> list[Way]:
    """Returns the ways that words name: all, 12, 6-cached."""
    made = []
    for word in words:
        number, _, cached = word.partition("-")
        made.append(Way(None if word == "all" else int(number), bool(cached)))
    return made


def rates_of(method: str, way: Way, layers: int, count: int) -> list[float]:
    """Returns learning rates to try, half a decade apart around the method's own for so many layers."""
    more = math.sqrt(layers / (way.late or layers))
    exponents = (0.5 * (i - count // 2) for i in range(count))
    return [float(f"{SCALE[method] * more * 10**exponent:.2g}") for exponent in exponents]


class LateTrainer(Trainer):
    """Trainer that leaves early layers frozen, and stops by the processor's clock."""

    def train(self, method: str, way: Way, lr: float, seed: int, role: str) -> Outcome:
        """Trains within the budget, then judges; a run whose loss is not finite counts as all wrong."""
        self.put_back()
        s, train = self._settings, self._task.train
        layers = self._model.config.num_hidden_layers
        engine = self._engine({**tezo_fields(method, lr, seed, s), **way.fields(layers)})
        count = min(s.train_examples, len(train))
        subset = [train[i] for i in batch_indices(len(train), count, 0, seed, 0, 1)]
        encoded = encode(self._tokenizer, subset, s.max_length)
        steps, seconds, error = 0, 0.0, None
        while seconds < s.budget and error is None:
            start = time.process_time()
            chosen = batch_indices(count, s.batch_size, steps, seed + SEEDS_APART, 0, 1)
            batch = collate([encoded[i] for i in chosen], self._pad)
            try:
                engine.step({**batch, EXAMPLE_IDS: torch.tensor(chosen)})
                steps += 1
            except ProbeError as problem:
                error = str(problem)
            seconds += time.process_time() - start
        judged = self.judge(role, engine)
        if error is None and judged.loss is None:
            error = "the loss after training is not finite"
        accuracy = judged.accuracy if error is None else 0.0
        return replace(judged, steps=steps, seconds=seconds, error=error, accuracy=accuracy)


class Benchmark:
    """The runs that the arguments ask for, and those that are finished."""

    def __init__(self, args: argparse.Namespace, results: Results, console: Console) -> None:
        self._args, self._results, self._console = args, results, console
        self.ways = ways_of(args.ways)
        self.settings = Settings(
            args.budget, args.batch_size, args.train_examples, args.valid_examples,
            args.test_examples, include=tuple(args.include), dtype=args.dtype,
        )  # fmt: skip

    def key(self, task: str, way: Way) -> Record:
        """Returns the fields that the runs of a task and way have in common."""
        args = self._args
        common = {"task": task, "way": way.name, "method": args.method, "layers": args.layers}
        return {**common, "model": args.model, **self.settings.fields()}

    def wanted(self) -> Iterator[tuple[Way, Record]]:
        """Yields every run with the fields that name it; a final one has its rate once all candidates were
        tried, before that None."""
        args = self._args
        for task in args.tasks:
            for index, way in itertools.product(range(args.rates), self.ways):
                lr = self._rates(way)[index]
                yield way, {**self.key(task, way), "role": "tune", "lr": lr, "seed": TUNING_SEED}
            for seed, way in itertools.product(range(args.seeds), self.ways):
                yield way, self._final(task, way, TUNING_SEED + 1 + seed)

    def _rates(self, way: Way) -> list[float]:
        return rates_of(self._args.method, way, self._args.layers, self._args.rates)

    def _final(self, task: str, way: Way, seed: int) -> Record:
        key = self.key(task, way)
        best = best_rate(self._results, key, self._rates(way), by_loss=True)
        return {**key, "role": "final", "lr": best, "seed": seed}

    def run(self, trainers: dict[str, LateTrainer]) -> None:
        """Runs all that is left, in order."""
        machine = describe()
        for way, key in self.wanted():
            if self._results.find(key) is not None:
                continue
            found = trainers[key["task"]].train(
                key["method"], way, key["lr"], key["seed"], key["role"]
            )
            self._results.add({**key, **asdict(found), "machine": machine, "time": time.time()})
            self._console.print(
                f"{key['task']}, {key['role']}, {way.name}, lr {key['lr']:g}, seed {key['seed']}: "
                f"{found.steps} steps, accuracy {found.accuracy:.3f}, loss {found.loss or math.nan:.3f}"
            )

    def report(self) -> None:
        """Prints a table for each task: rates tried, then the runs on test examples."""
        for task in self._args.tasks:
            title = f"{task}, {self._args.method}, {self.settings.budget:g} processor seconds"
            table = Table(title=title)
            for column in COLUMNS:
                table.add_column(column, no_wrap=True)
            seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + self._args.seeds)
            found = {
                way: [
                    run for seed in seeds
                    if (run := self._results.find(self._final(task, way, seed))) is not None
                ]
                for way in self.ways
            }  # fmt: skip
            for way, runs in found.items():
                table.add_row(*self._cells(way, runs, found.get(Way(), [])))
            self._console.print(table)
            self._console.print(self._tried(task))

    def _tried(self, task: str) -> str:
        """Returns lines on the validation loss of every rate tried."""
        lines = []
        for way in self.ways:
            runs = [
                self._results.find({**self.key(task, way), "role": "tune", "lr": lr})
                for lr in self._rates(way)
            ]
            tried = [
                f"{r['lr']:g}: {r['loss'] or math.nan:.3f} in {r['steps']} steps" for r in runs if r
            ]
            lines.append(f"{way.name}, validation loss by lr: " + ("; ".join(tried) or "none yet"))
        return "\n".join(lines)

    def _cells(self, way: Way, runs: list[Record], base: list[Record]) -> list[str]:
        if not runs:
            return [way.name, *[""] * (len(COLUMNS) - 1)]
        losses = [math.nan if run["loss"] is None else run["loss"] for run in runs]
        theirs = {run["seed"]: run["accuracy"] for run in base if way != Way()}
        less = [run["accuracy"] - theirs[run["seed"]] for run in runs if run["seed"] in theirs]
        steps = sum(run["steps"] for run in runs) / len(runs)
        seconds = sum(run["seconds"] for run in runs) / len(runs)
        return [
            way.name, f"{runs[0]['lr']:g}", *_mean([run["accuracy"] for run in runs], 100, 1),
            *_mean(losses, 1, 3), " ± ".join(filter(None, _mean(less, 100, 1))) if less else "",
            str(len(runs)), f"{steps:.0f}", f"{seconds:.1f}",
        ]  # fmt: skip


def _mean(values: Sequence[float], scale: float, digits: int) -> tuple[str, str]:
    mean, half = interval(values)
    return f"{scale * mean:.{digits}f}", "" if half is None else f"{scale * half:.{digits}f}"


def arguments() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=["trec", "rotten-tomatoes"])
    add("--ways", nargs="+", default=["all", "12", "6", "6-cached"], help="all, 6, 6-cached, …")
    add("--method", default="tezo-adam-coef", choices=list(SCALE))
    add("--include", nargs="+", default=["*v_proj*"], help="globs, of the layers that train")
    add("--layers", type=int, default=30, help="of the model")
    add("--budget", type=float, default=120.0, help="processor seconds of training of each run")
    add("--seeds", type=int, default=3, choices=range(1, MOST_SEEDS + 1), metavar="N")
    add("--rates", type=int, default=3, help="learning rates to try, each with one run")
    add("--batch-size", type=int, default=8)
    add("--train-examples", type=int, default=800)
    add("--valid-examples", type=int, default=100)
    add("--test-examples", type=int, default=200)
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the weights")
    add("--model", default=".cache/quickstart/SmolLM2-135M-Instruct")
    add("--cache", type=Path, default=ROOT / ".cache/methods", help="of the data")
    add("--out", type=Path, default=ROOT / "runs/trunk_accuracy.jsonl", help="finished runs")
    add("--report", action="store_true", help="run nothing, report what there is")
    return parser


def trainers_of(args: argparse.Namespace, settings: Settings) -> dict[str, LateTrainer]:
    """Makes a trainer for each task; all share one model."""
    importlib.import_module("tezo_ds.rng.compiled")  # compiles: not within a run's budget
    folder = str(ROOT / args.model)  # the path itself where it is absolute
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, settings.dtype))
    splits = {
        task: load_splits(task, args.cache, args.valid_examples, args.test_examples)
        for task in args.tasks
    }
    weights = Weights(model)
    return {task: LateTrainer(model, tokenizer, splits[task], settings, weights) for task in splits}


def main(words: Sequence[str] | None = None) -> None:
    args = arguments().parse_args(words)
    console = Console(soft_wrap=True, width=120)
    console.print(describe())
    benchmark = Benchmark(args, Results(args.out), console)
    if not args.report:
        torch.set_num_threads(1)
        try:
            benchmark.run(trainers_of(args, benchmark.settings))
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from here")
    benchmark.report()


if __name__ == "__main__":
    main()
