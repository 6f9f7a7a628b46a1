"""What a step teaches, against honest baselines: accuracy of methods after the same processor seconds.

SmolLM2-135M-Instruct on four tasks (see parts/methods/data.py), by `tezo-ds train` in a process of its own a
run, one thread. An arm is a head (frozen, bias, fit, inner or values, see docs/output-layer.md) and a
method's steps behind it, or none; frozen+adamw and frozen+adamw-lora are backpropagation, to compare with. A
run makes as many steps as fit into the budget, what the head takes included, at the pace that two pilot runs
of the arm had; processor seconds count, so a busy machine changes little. Each method's rate is the best on
validation examples of TREC, by loss, of rates ten times apart that are tried until the best has a worse one
on either side, and of a third and three times of it; all other tasks get it, too.

    python benchmarks/learning.py                                       all; many hours
    python benchmarks/learning.py --tasks trec --arms bias fit --seeds 3
    python benchmarks/learning.py --tasks trec sms --arms frozen+tt frozen+lora --include '*' --no-page
    python benchmarks/learning.py --trunk-cache --arms frozen+lozo frozen+mezo --factor lozo=100 mezo=333
    python benchmarks/learning.py --report                              writes docs/learning.md's table alone
    python benchmarks/learning.py --report --page docs/learning-late.md --part twenty --curves --budget 1200 …

A finished run is a line in --out, which is kept in the repository: any machine goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from parts.common.machine import describe
from parts.learning.arguments import ROOT, arguments, command, of_arm
from parts.learning.arms import FIRST_ORDER, NONE, Arm, arms_of
from parts.learning.clocked import run_for
from parts.learning.curves import curve_of, draw_curves
from parts.learning.first_order import WAYS
from parts.learning.report import draw, markdown, markers, tables_of
from parts.methods.data import FIELDS, SHORT, load_splits
from parts.methods.report import MOST_SEEDS, Record, Results, put_between_markers
from rich.console import Console

TUNED_ON, TUNING_SEED = "trec", 0
# Of the rates in STEPS; further ones, while the best lies at an end.
FIRST_FACTORS = (100.0, 1000.0)
MOST_FACTORS = 8
NEARER = 3.0  # what the best of rates ten times apart is at last multiplied and divided by
PILOTS = (1, 5)  # steps
ENDLESS = 100_000  # steps that no budget has room for
PILOT_EXAMPLES, TUNING_EXAMPLES = 16, 200  # to test with, at most


class Benchmark:
    """The runs that the arguments ask for, and those that are finished."""

    def __init__(self, args: argparse.Namespace, results: Results, console: Console) -> None:
        self._args, self._results, self._console = args, results, console
        self.arms = arms_of(args.arms)

    def run(self) -> None:
        """Runs all that is left, a seed of all arms and tasks after the other."""
        for task in self._args.tasks:
            load_splits(task, self._args.cache, 1, 1)  # downloads what is not there
        for seed in range(1, 1 + self._args.seeds):
            for task in self._args.tasks:
                for arm in self.arms:
                    self._final(task, arm, seed)

    def _final(self, task: str, arm: Arm, seed: int) -> None:
        factor = self._tuned(arm)
        key = self._key(task, arm, seed, factor)
        if self._results.find(key) is None:
            if arm.steps in FIRST_ORDER:
                found = self._by_first_order(task, arm, seed)
            else:
                found = self._trained(task, arm, seed, factor, "test")
            self._results.add({**key, **found})
            self._tell(f"{task}, {arm.name}, seed {seed}", found)

    def _key(self, task: str, arm: Arm, seed: int, factor: float) -> Record:
        """Returns the fields that name a final run."""
        return {**self._common(task, arm), "role": "final", "seed": seed, "factor": factor}

    def _common(self, task: str, arm: Arm) -> Record:
        args = self._args
        return {
            "task": task, "arm": arm.name, "budget": args.budget if arm.steps != NONE else 0,
            "examples": args.examples, "test_examples": args.test_examples, "include": args.include,
            **({"batch_size": size} if (size := self._batch_size(arm)) else {}),
            "trunk_cache": True if args.trunk_cache and arm.steps not in FIRST_ORDER else None,
        }  # fmt: skip

    def _batch_size(self, arm: Arm) -> int | None:
        """Returns the examples of a step that were asked for, or None for the arm's own."""
        given = of_arm(self._args.batch_size, arm)
        return None if given is None else int(given)

    def _tuned(self, arm: Arm) -> float:
        """Returns the factor of a method's rate that validates best on one task, by loss."""
        if (given := self._given(arm)) is not None:
            return given
        losses: dict[float, float] = {}
        wanted: float | None = FIRST_FACTORS[0]
        while wanted is not None and len(losses) < MOST_FACTORS:
            losses[wanted] = self._validated(arm, wanted)
            wanted = next_factor(losses)
        return min(losses, key=lambda factor: losses[factor])

    def _given(self, arm: Arm) -> float | None:
        """Returns the factor where nothing is tuned, else None."""
        return of_arm(self._args.factor, arm) if arm.tuned else 1.0

    def _best_so_far(self, arm: Arm) -> float:
        """Returns the factor that is best of those which were tried."""
        if (given := self._given(arm)) is not None:
            return given
        tried = self._results.find_all({**self._common(TUNED_ON, arm), "role": "tune"})
        best = min(tried, key=_loss, default={"factor": 1.0})
        return float(best["factor"])

    def _validated(self, arm: Arm, factor: float) -> float:
        """Returns the validation loss at a factor of the rate, infinite where it is not finite."""
        key = {**self._common(TUNED_ON, arm), "role": "tune", "factor": factor}
        record = self._results.find(key)
        if record is None:
            record = {**key, **self._trained(TUNED_ON, arm, TUNING_SEED, factor, "valid")}
            self._results.add(record)
            self._tell(f"{TUNED_ON}, {arm.name}, rate times {factor:g}", record)
        return _loss(record)

    def _steps(self, task: str, arm: Arm) -> int:
        """Returns how many steps the budget has room for, by two pilot runs and one without the arm."""
        if arm.steps == NONE:
            return 0
        taken = []
        for head, steps in ((arm.head, PILOTS[0]), (arm.head, PILOTS[1]), ("frozen", PILOTS[0])):
            key = {**self._common(task, Arm(head, arm.steps)), "role": "pilot", "steps": steps}
            record = self._results.find(key)
            if record is None:
                record = {
                    **key,
                    **self._call(
                        task, Arm(head, arm.steps), 0, 1.0, "valid", steps, PILOT_EXAMPLES
                    ),
                }
                self._results.add(record)
            taken.append(record["seconds"])
        pace = max(0.01, (taken[1] - taken[0]) / (PILOTS[1] - PILOTS[0]))
        return max(1, int((self._args.budget - max(0.0, taken[0] - taken[2])) / pace))

    def _trained(self, task: str, arm: Arm, seed: int, factor: float, split: str) -> Record:
        most = TUNING_EXAMPLES if split == "valid" else self._args.test_examples
        if self._args.trunk_cache and arm.steps != NONE:
            return self._clocked(task, arm, seed, factor, split, most)
        return self._call(task, arm, seed, factor, split, self._steps(task, arm), most)

    def _call(
        self, task: str, arm: Arm, seed: int, factor: float, split: str, steps: int, most: int
    ) -> Record:
        """Makes one run in a process of its own, and returns what it found."""
        with tempfile.TemporaryDirectory(prefix="learning-") as folder:
            out = Path(folder) / "run"
            words = self._words(task, arm, seed, factor, split, steps, most, out)
            before = _processor_seconds()
            _run(words)
            seconds = _processor_seconds() - before
            summary = json.loads((out / "summary.json").read_text())
        return {
            "accuracy": summary["accuracy_after"], "loss": summary["test_loss_after"],
            **_known(summary), "steps_made": steps, "seconds": seconds,
        }  # fmt: skip

    def _clocked(
        self, task: str, arm: Arm, seed: int, factor: float, split: str, most: int
    ) -> Record:
        """Makes one run that is stopped when the budget is used up, and returns what it found."""
        with tempfile.TemporaryDirectory(prefix="learning-") as folder:
            out = Path(folder) / "run"
            words = self._words(task, arm, seed, factor, split, ENDLESS, most, out)
            words += ["--trunk-cache", "memory", "--train-examples", str(self._args.examples)]
            seconds = run_for(words, self._args.budget, Path(folder) / "log", _environment())
            summary = json.loads((out / "summary.json").read_text())
            evaluate = [sys.executable, "-m", "tezo_ds", "evaluate", "--run", str(out)]
            found = json.loads(_run(evaluate))
            curve = curve_of(out, self._args.budget)
        return {
            "accuracy": found["accuracy"], "loss": found["loss"],
            **_known(summary), "steps_made": summary["steps"], "seconds": seconds, "curve": curve,
        }  # fmt: skip

    def _words(
        self, task: str, arm: Arm, seed: int, factor: float, split: str, steps: int, most: int, out: Path
    ) -> list[str]:  # fmt: skip
        """Returns the command line of a run."""
        args = self._args
        words = [sys.executable, "-m", "tezo_ds", "train", *self._data(task, split)]
        words += arm.flags(factor, {
            "model": args.model, "objective": "choices", "seed": seed, "steps": max(1, steps),
            "test_examples": min(most, args.test_examples), "output_layer_examples": args.examples,
            "max_length": args.max_length, "output": out, "no_save_model": True, "check_every": 0,
            "snapshot_every": 0,
        }, self._batch_size(arm))  # fmt: skip
        if "--include" not in words:
            for pattern in args.include if arm.steps != NONE else ["last:1"]:
                words += ["--include", pattern]
        if arm.steps == NONE:
            words += ["--lr", "0", "--batch-size", "1"]
            # Those that train where there are steps.
            words += ["--train-examples", str(args.examples)] if args.trunk_cache else []
        return words

    def _by_first_order(self, task: str, arm: Arm, seed: int) -> Record:
        """Trains by backpropagation for the budget, and returns what that gives on the test examples."""
        args, way = self._args, FIRST_ORDER[arm.steps]
        words = [sys.executable, "-m", "parts.learning.first_order", "--way", way]
        words += ["--lr", str(WAYS[way]), "--seed", str(seed), *self._data(task, "test")]
        for name in ("model", "budget", "max_length", "test_examples"):
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        if size := self._batch_size(arm):
            words += ["--batch-size", str(size)]
        found: Record = json.loads(_run(words).splitlines()[-1])
        return {
            **found, "zero_shot": None, "head": None, "fit": None, "machine": describe(), "time": time.time(),
        }  # fmt: skip

    def _data(self, task: str, split: str) -> list[str]:
        folder = self._args.cache / task
        train, test = str(folder / "train.jsonl"), str(folder / f"{split}.jsonl")
        if task not in FIELDS:
            words = ["--task", task, "--data", train, "--test-data", test]
            return [*words, "--template", SHORT[task]] if task in SHORT else words
        fields = FIELDS[task]
        return [
            "--task", train, "--test-data", test, "--template", fields["template"],
            "--verbalizers", json.dumps(fields["verbalizers"]),
        ]  # fmt: skip

    def _tell(self, what: str, found: Record) -> None:
        loss = math.nan if found["loss"] is None else found["loss"]
        self._console.print(
            f"{what}: {found['accuracy']:.1%}, loss {loss:.3f}, {found['steps_made']} steps, "
            f"{found['seconds']:.0f} processor seconds"
        )

    def finished(self) -> Iterator[tuple[str, Arm, list[Record]]]:
        """Yields the final runs that there are, by task and arm."""
        for task in self._args.tasks:
            for arm in self.arms:
                seeds, factor = range(1, 1 + MOST_SEEDS), self._best_so_far(arm)
                runs = [self._results.find(self._key(task, arm, seed, factor)) for seed in seeds]
                if found := [run for run in runs if run is not None]:
                    yield task, arm, found


def next_factor(losses: dict[float, float]) -> float | None:
    """Returns the factor to try after those whose losses are known, or None where the best has neighbours
    ten times and NEARER apart."""
    untried = [factor for factor in FIRST_FACTORS if factor not in losses]
    if untried:
        return untried[0]
    decades = [factor for factor in losses if math.log10(factor).is_integer()]
    best = min(decades, key=lambda factor: losses[factor])
    if best == max(decades) and math.isfinite(losses[best]):
        return best * 10
    if best == min(decades):
        return best / 10
    nearer = (float(f"{factor:.3g}") for factor in (best * NEARER, best / NEARER))
    return next((factor for factor in nearer if factor not in losses), None)


def _loss(record: Record) -> float:
    """Returns a run's loss, infinite where it is not finite."""
    return math.inf if record["loss"] is None else float(record["loss"])


def _run(words: list[str]) -> str:
    """Runs a process of one thread, and returns what it printed; ends this one where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}:\n{done.stderr or done.stdout}")
    return done.stdout


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def _known(summary: Record) -> Record:
    """Returns what a record keeps of a run's summary, apart from its result."""
    return {
        "zero_shot": summary["accuracy_before"], "majority": summary.get("accuracy_majority"),
        "head": summary.get("accuracy_output_layer"), "fit": summary.get("output_layer"),
        "machine": describe(), "time": time.time(),
    }  # fmt: skip


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(words: Sequence[str] | None = None) -> None:
    args = arguments(__doc__).parse_args(words)
    console = Console(soft_wrap=True, width=120)
    console.print(describe())
    benchmark = Benchmark(args, Results(args.out), console)
    if not args.report:
        try:
            benchmark.run()
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from here")
    lines = list(benchmark.finished())
    for table in tables_of(lines, args.beside):
        console.print(table)
    if args.page is not None and lines:
        stem = f"{args.page.stem}-{args.part}" if args.part else args.page.stem
        picture = args.page.with_name(f"{stem}.png")
        text = markdown(lines, command(args), picture.name, args.beside, args.compact)
        draw(lines, picture)
        curves = args.page.with_name(f"{stem}-curves.png")
        if args.curves and draw_curves(lines, curves):
            text += f"\n\n![Loss by seconds, sequences and gathers]({curves.name})"
        put_between_markers(args.page, text, markers(args.part))


if __name__ == "__main__":
    main()
