"""What can be trained that has no gradient: the accuracy of a batch beside its loss, and a judged answer.

    objectives   TREC's accuracy as the objective beside the cross-entropy of its label words: one method,
                 equally many directions and examples a step, equal processor seconds; ρ and η each from a
                 grid of its own, by accuracy on validation examples of one seed
    answers      the mean reward of generated answers, 1 for the right one and 0 for any other, on a task that
                 a seed writes (parts/rewards/generated.py), before and after, with answers shown

SmolLM2-135M-Instruct, in one process of one thread.

    python benchmarks/rewards.py
    python benchmarks/rewards.py --parts answers --task sums --seeds 1
    python benchmarks/rewards.py --report                    what there is, by docs/rewards.md's tables

A finished run is a line in --out; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parts.common.machine import describe
from parts.methods.data import SHORT, load_splits
from parts.methods.report import MOST_SEEDS, Record, Results, put_between_markers
from parts.rewards.generated import TASKS, rows_of
from parts.rewards.report import MARKERS, tables_of
from parts.rewards.training import trained
from rich.console import Console

from tezo_ds.config import TezoConfig
from tezo_ds.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
TREC = "trec"
# Of each objective, pairs of ρ and η that are tried: a metric moves in steps, so it takes a larger ρ.
GRIDS: dict[str, tuple[tuple[float, float], ...]] = {
    "choices": ((1e-3, 1e-3), (1e-3, 3e-3)),
    "accuracy": ((3e-2, 3e-3), (3e-2, 1e-3), (1e-2, 1e-3)),
}
STEP: dict[str, Any] = {"method": "tezo-adam-coef", "queries": 2, "check_every": 0}
ANSWERS: dict[str, Any] = {**STEP, "queries": 4, "rho": 1e-2, "lr": 1e-3}
VALIDATION = 100  # examples, at most


class Benchmark:
    """The runs that the arguments ask for, and those that are finished."""

    def __init__(self, args: argparse.Namespace, results: Results, console: Console) -> None:
        self._args, self._results, self._console = args, results, console

    def run(self) -> None:
        """Makes all runs that are left."""
        for seed in range(1, 1 + self._args.seeds):
            if "objectives" in self._args.parts:
                for objective in GRIDS:
                    self.objective(objective, seed)
            if "answers" in self._args.parts:
                self.answers(seed)

    def objective(self, objective: str, seed: int) -> Record:
        """Trains on one objective of TREC, by the pair of its grid that validates best."""
        rho, lr = self.best_of(objective)
        return self._trec(
            {"role": "final", "objective": objective, "seed": seed, "rho": rho, "lr": lr}, "test"
        )

    def best_of(self, objective: str) -> tuple[float, float]:
        """Returns ρ and η of an objective, by accuracy on validation examples."""
        if self._args.no_tune:
            return GRIDS[objective][0]
        tried = {}
        for rho, lr in GRIDS[objective]:
            key = {"role": "tune", "objective": objective, "seed": 0, "rho": rho, "lr": lr}
            tried[rho, lr] = self._trec(key, "valid")["value"]
        return max(tried, key=lambda pair: tried[pair])

    def _trec(self, key: Record, split: str) -> Record:
        args, folder = self._args, self._args.cache / TREC
        key = {
            "part": "objectives", **key, "budget": args.objective_budget,
            "include": args.objective_include, "batch_size": args.objective_batch,
            "examples": args.examples, "test_examples": args.test_examples,
        }  # fmt: skip
        most = args.test_examples if split == "test" else min(VALIDATION, args.test_examples)
        settings = Settings(
            model=args.model, task=TREC, data=str(folder / "train.jsonl"),
            test_data=str(folder / f"{split}.jsonl"), template=SHORT[TREC], objective=key["objective"],
            train_examples=args.examples, test_examples=most, max_length=64,
        )  # fmt: skip
        config = TezoConfig(
            **STEP, rho=key["rho"], lr=key["lr"], include=tuple(key["include"]), seed=key["seed"],
            trunk_cache="memory",
        )  # fmt: skip
        return self._made(key, settings, config, key["batch_size"], key["budget"])

    def answers(self, seed: int) -> Record:
        """Trains on the exact match of what the model answers to a task's prompts."""
        args = self._args
        key = {
            "part": "answers", "task": args.task, "seed": seed, "budget": args.budget,
            "include": args.include, "batch_size": args.batch_size, "rho": args.rho, "lr": args.lr,
            "queries": args.queries,
        }  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="rewards-") as folder:
            files = [Path(folder) / f"{name}.jsonl" for name in ("train", "test")]
            for file, rows in zip(
                files, rows_of(args.task, seed, args.rows, args.test_rows), strict=True
            ):
                file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            settings = Settings(
                model=args.model, task=str(files[0]), test_data=str(files[1]), reward=("exact",),
                stop=("\n",), max_new_tokens=args.new_tokens, max_length=64,
            )  # fmt: skip
            chosen = {**ANSWERS, "rho": args.rho, "lr": args.lr, "queries": args.queries}
            config = TezoConfig(**chosen, include=tuple(args.include), seed=seed)
            return self._made(key, settings, config, args.batch_size, args.budget, zero_shot=True)

    def _made(
        self, key: Record, settings: Settings, config: TezoConfig, batch_size: int, budget: float,
        zero_shot: bool = False,
    ) -> Record:  # fmt: skip
        record = self._results.find(key)
        if record is None:
            found = trained(settings, config, batch_size, budget, zero_shot)
            record = {**key, **found, "machine": describe(), "time": time.time()}
            self._results.add(record)
            shown = ", ".join(f"{name} {value}" for name, value in key.items() if name != "part")
            self._console.print(
                f"{shown}: {record['value']:.1%} after {record['steps_made']} steps, {record['tied']:.0%} of "
                "them tied"
            )
        return record


def arguments() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--parts", nargs="+", choices=("objectives", "answers"), default=["objectives", "answers"])
    add("--seeds", type=int, default=3, choices=range(1, MOST_SEEDS + 1), metavar="N")
    add("--objective-budget", type=float, default=60.0, help="processor seconds of a run on TREC")
    add("--objective-include", nargs="+", default=["last:1"], help="what trains on TREC")
    add("--objective-batch", type=int, default=32, help="examples of a step on TREC")
    add("--no-tune", action="store_true", help="take the first pair of ρ and η of each grid")
    add("--examples", type=int, default=400, help="training examples of TREC")
    add("--test-examples", type=int, default=400, help="of TREC")
    add("--task", choices=TASKS, default="cities", help="of answers")
    add("--budget", type=float, default=120.0, help="processor seconds of a run on answers")
    add("--include", nargs="+", default=["last:6"], help="what trains on answers")
    add("--rho", type=float, default=ANSWERS["rho"], help="of answers")
    add("--lr", type=float, default=ANSWERS["lr"], help="of answers")
    add("--queries", type=int, default=ANSWERS["queries"], help="of answers")
    add("--batch-size", type=int, default=8, help="prompts of a step")
    add("--rows", type=int, default=400, help="prompts to train with")
    add("--test-rows", type=int, default=100, help="prompts to test with")
    add("--new-tokens", type=int, default=6)
    add("--model", default=str(ROOT / ".cache/quickstart/SmolLM2-135M-Instruct"))
    add("--cache", type=Path, default=ROOT / ".cache/methods", help="of TREC")
    add("--out", type=Path, default=ROOT / "docs/rewards.jsonl", help="finished runs")
    add("--page", type=Path, default=ROOT / "docs/rewards.md", help="where the tables go")
    add("--no-page", dest="page", action="store_const", const=None, help="on the screen only")
    add("--report", action="store_true", help="run nothing, report what there is")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    args = arguments().parse_args(words)
    torch.set_num_threads(1)
    console, results = Console(soft_wrap=True, width=120), Results(args.out)
    console.print(describe())
    if not args.report:
        if "objectives" in args.parts:
            load_splits(TREC, args.cache, 1, 1)  # downloads what is not there
        try:
            Benchmark(args, results, console).run()
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from here")
    text = tables_of(results.records)
    console.print(text, markup=False)
    if args.page is not None and text:
        put_between_markers(args.page, text, MARKERS)


if __name__ == "__main__":
    main()
