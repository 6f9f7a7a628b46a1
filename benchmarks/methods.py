"""All methods side by side on real data: accuracy after the same seconds of training.

SmolLM2-135M-Instruct on two tasks (see parts/methods/data.py). Each method makes as many steps as fit into
the budget at its own pace, which is measured first, in turns, on a machine that should then be quiet;
after that nothing depends on how busy it is. Each method tries as many learning rates, with one seed
and the full budget, judged on validation examples; the best of them then trains from other
seeds (of directions, data order and training subset) and is judged on the test examples. Beside them:
no training, and AdamW on LoRA adapters by backpropagation, tuned alike.

    python benchmarks/methods.py                 all; some two hours on two cores, alone on the machine
    python benchmarks/methods.py --seeds 5       goes on from there: no finished run is repeated
    python benchmarks/methods.py --report        only writes docs/methods.md and docs/methods.png

A run that was finished is a line in OUT/results.jsonl; Ctrl-C loses the one in progress.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from parts.common.machine import describe
from parts.methods import training as methods_training
from parts.methods.data import TASKS, Splits, load_splits
from parts.methods.report import (
    BASE,
    MOST_SEEDS,
    Line,
    Record,
    Results,
    best_rate,
    draw,
    markdown,
    put_between_markers,
    summarise,
    tables,
)
from parts.methods.training import LORA, Settings, Trainer, Weights
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from tezo_ds.config.registry import METHODS

ROOT = Path(__file__).resolve().parent.parent
ZERO_SHOT = "zero-shot"
TUNING_SEED = 0  # the final ones are 1, 2, …
AROUND_SECONDS, MEMORY_SECONDS = 2.0, 6.0  # guesses: of restoring weights; of a memory run
FORWARD_ONLY: tuple[str, ...] = tuple(METHODS)

# The scale of each method's rates. tezo's is the quickstart's; the others move the weights about as far a
# step: a direction's entries have variance 16, 2 and 1, κ grows with their root (about 50 for tezo on
# TREC), and Adam divides it away.
SCALE = {
    "tezo-gn": 1.0,
    "tezo": 2e-5, "tezo-m": 2e-5, "tezo-adam": 4e-3, "tezo-adam-coef": 1e-3, "lozo": 1.6e-4,
    "lozo-m": 1.6e-4, "mezo": 3.2e-4, "mezo-m": 3.2e-4, "mezo-adam": 4e-3, LORA: 1e-3,
}  # fmt: skip


def rates_of(method: str, count: int) -> list[float]:
    """Returns learning rates to try: half a decade apart, down from half a decade above the method's own."""
    exponents = (0.5 * (i - count + 2) for i in range(count))
    return [float(f"{SCALE[method] * 10**exponent:.2g}") for exponent in exponents]


class Benchmark:
    """The runs that the arguments ask for, those that are finished, and the rest."""

    def __init__(self, args: argparse.Namespace, results: Results, console: Console) -> None:
        self._args, self._results, self._console = args, results, console
        self.settings = Settings(
            args.budget, args.batch_size, args.train_examples, args.valid_examples,
            args.test_examples, rho=args.rho, dense_rho=args.dense_rho, dtype=args.dtype,
        )  # fmt: skip

    def key(self, task: str, method: str) -> Record:
        """Returns the fields that the runs of a task and method have in common."""
        return {"task": task, "method": method, "model": self._args.model, **self.settings.fields()}

    def wanted(self) -> Iterator[Record]:
        """Yields every run as the fields that name it, methods in turn so that the machine is as fast or as
        slow for all; a final run has its rate once all its candidates were tried, before that None."""
        methods, tasks, count = self._args.methods, self._args.tasks, self._args.rates
        for task in tasks:
            yield {**self.key(task, ZERO_SHOT), "role": "final", "lr": None, "seed": None}
        for method, task in itertools.product(methods, tasks):
            yield {**self.key(task, method), "role": "memory"}
        for index, task, method in itertools.product(range(count), tasks, methods):
            lr = rates_of(method, count)[index]
            yield {**self.key(task, method), "role": "tune", "lr": lr, "seed": TUNING_SEED}
        for seed, task, method in itertools.product(range(self._args.seeds), tasks, methods):
            key = self.key(task, method)
            best = best_rate(self._results, key, rates_of(method, count))
            yield {**key, "role": "final", "lr": best, "seed": TUNING_SEED + 1 + seed}

    def pace_key(self, task: str, method: str) -> Record:
        """Returns the fields that name a pace: the seconds that a step takes, whatever the budget."""
        key = {**self.key(task, method), "role": "pace"}
        return {name: value for name, value in key.items() if name != "budget"}

    def measure_paces(self, trainers: dict[str, Trainer]) -> None:
        """Measures the paces of all methods of a task together, unless they are known."""
        for task, trainer in trainers.items():
            keys = {method: self.pace_key(task, method) for method in self._args.methods}
            if all(self._results.find(key) is not None for key in keys.values()):
                continue
            self._console.print(f"{task}: measuring how long each method's steps take")
            for method, seconds in trainer.paces(list(keys)).items():
                self._results.add({**keys[method], "step_seconds": seconds, "machine": describe()})
                self._console.print(f"{task} {method}: {seconds:.3f} s a step")

    def left(self) -> list[Record]:
        """Returns the runs of `wanted` that are not finished."""
        return [run for run in self.wanted() if self._results.find(run) is None]

    def seconds_left(self) -> float:
        """Estimates the seconds left: budgets, and judging as fast as the untrained model was judged."""
        total = 0.0
        for run in self.left():
            judged = self._results.find({**self.key(run["task"], ZERO_SHOT), "role": "final"})
            per_example = judged["seconds_judging"] / judged["n"] if judged else 0.05
            examples = {
                "tune": self.settings.valid_examples,
                "final": self.settings.test_examples,
            }.get(run["role"], 0)
            trains = run["role"] in ("tune", "final") and run["method"] != ZERO_SHOT
            around = MEMORY_SECONDS if run["role"] == "memory" else AROUND_SECONDS
            total += around + per_example * examples + self.settings.budget * trains
        return total

    def run(self, trainers: dict[str, Trainer]) -> None:
        """Runs all that is left, in order."""
        machine = describe()
        self.measure_paces(trainers)
        for key in self.wanted():
            if self._results.find(key) is not None:
                continue
            trainer, made = trainers[key["task"]], {"machine": machine, "time": time.time()}
            if key["role"] == "memory":
                found: Record = {"peak_bytes": trainer.peak_bytes(key["method"])}
            elif key["method"] == ZERO_SHOT:
                trainer.put_back()
                found = asdict(trainer.judge("final"))
            else:
                pace = self._results.find(self.pace_key(key["task"], key["method"]))
                assert pace is not None, "measured above"
                steps = max(1, round(self.settings.budget / pace["step_seconds"]))
                outcome = trainer.run(key["method"], key["lr"], key["seed"], key["role"], steps)
                found = {**asdict(outcome), "step_seconds": pace["step_seconds"]}
            self._results.add({**key, **found, **made})
            if key["role"] != "memory":
                self._tell(key, found)

    def _tell(self, key: Record, found: Record) -> None:
        rate = "" if key["lr"] is None else f" lr {key['lr']:.2g} seed {key['seed']}"
        speed = f" in {found['steps']} steps, {found['seconds']:.0f} s" if found["steps"] else ""
        trouble = f" ({found['error']})" if found["error"] else ""
        self._console.print(
            f"{key['task']} {key['method']}{rate} {key['role']}: {found['accuracy']:.1%}"
            f"{speed}{trouble}; {len(self.left())} runs left, about "
            f"{self.seconds_left() / 60:.0f} min"
        )

    def lines(self) -> list[Line]:
        """Returns what is finished, for the tables: no training first, backpropagation last."""
        found = []
        for task, method in itertools.product(self._args.tasks, [ZERO_SHOT, *self._args.methods]):
            if runs := self._finished(task, method):
                peak = self._results.find({**self.key(task, method), "role": "memory"})
                base = runs if method == BASE else self._finished(task, BASE)
                found.append(summarise(runs, peak, base))
        return found

    def _finished(self, task: str, method: str) -> list[Record]:
        """Returns the final runs that are finished, by seed."""
        asked = [
            run for run in self.wanted()
            if (run["task"], run["method"], run["role"]) == (task, method, "final")
            and (run["lr"] is not None or method == ZERO_SHOT)
        ]  # fmt: skip
        return [record for run in asked if (record := self._results.find(run)) is not None]

    def report(self, page: Path | None) -> None:
        """Prints tables and, with a page, writes them there, and a picture beside it."""
        lines = self.lines()
        for table in tables(lines):
            self._console.print(table)
        if page is None or not lines:
            return
        s = self.settings
        setting = (
            f"{s.budget:g} s of training, batches of {s.batch_size}, {s.queries} direction(s) a step, "
            f"{s.dtype}, ρ {s.rho:g} (MeZO {s.dense_rho:g}), rank {s.rank} (LOZO 2), matrices "
            f"{', '.join(s.include)}; "
            f"{s.train_examples} training examples, {self._args.rates} learning rates tried on "
            f"{s.valid_examples} validation examples. MB: tensors alive at once in a step at most, model "
            f"included. vs coef: less {BASE}'s accuracy from the same seeds."
        )
        ours = [r for r in self._results.records if r["model"] == self._args.model]
        same = [r for r in ours if all(r.get(name) == value for name, value in s.fields().items())]
        machines = list(dict.fromkeys(record["machine"] for record in same))
        picture = f"![Accuracy by method]({page.stem}.png)"
        text = markdown(lines, command(self._args), machines, setting)
        put_between_markers(page, f"{text}\n\n{picture}")
        draw(lines, ZERO_SHOT, LORA, page.with_suffix(".png"))


def command(args: argparse.Namespace) -> str:
    """Returns the command that makes the same runs again."""
    parser = arguments()
    words = ["python benchmarks/methods.py"]
    for name in ("tasks", "methods", "budget", "seeds", "rates", "batch_size", "train_examples",
                 "valid_examples", "test_examples", "rho", "dense_rho", "dtype"):  # fmt: skip
        value = getattr(args, name)
        if value != parser.get_default(name):
            given = " ".join(value) if isinstance(value, list) else str(value)
            words.append(f"--{name.replace('_', '-')} {given}")
    return " ".join(words)


def arguments() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    everything = [*FORWARD_ONLY, LORA]
    add("--tasks", nargs="+", choices=TASKS, default=["trec", "rotten-tomatoes"])
    add("--methods", nargs="+", choices=everything, default=everything)
    add("--budget", type=float, default=60.0, help="seconds of training of each run")
    add("--seeds", type=int, default=3, choices=range(1, MOST_SEEDS + 1), metavar="N")
    add("--rates", type=int, default=4, help="learning rates to try, each with one run")
    add("--batch-size", type=int, default=8)
    add("--valid-examples", type=int, default=100)
    add("--rho", type=float, default=1e-3)
    add("--dense-rho", type=float, default=5e-3, help="ρ of MeZO")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the weights")
    methods_training.add_arguments(parser, "methods")
    add("--no-page", dest="page", action="store_const", const=None, help="on the screen only")
    return parser


def trainers_of(args: argparse.Namespace, settings: Settings) -> dict[str, Trainer]:
    """Makes a trainer for each task; all share one model."""
    importlib.import_module("tezo_ds.rng.compiled")  # compiles: not within a run's budget
    folder = str(ROOT / args.model)  # the path itself where it is absolute
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, settings.dtype))
    splits: dict[str, Splits] = {
        task: load_splits(task, args.cache, args.valid_examples, args.test_examples)
        for task in args.tasks
    }
    weights = Weights(model)
    return {task: Trainer(model, tokenizer, splits[task], settings, weights) for task in splits}


def main(words: Sequence[str] | None = None) -> None:
    args = arguments().parse_args(words)
    console = Console(soft_wrap=True)
    benchmark = Benchmark(args, Results(args.out / "results.jsonl"), console)
    if not args.report:
        console.print(describe())
        console.print(
            f"{len(benchmark.left())} runs, about {benchmark.seconds_left() / 60:.0f} min"
        )
        try:
            benchmark.run(trainers_of(args, benchmark.settings))
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from here")
    benchmark.report(args.page)


if __name__ == "__main__":
    main()
