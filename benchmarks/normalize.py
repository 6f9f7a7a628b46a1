"""Whether one learning rate serves several tasks, with `normalize: none` and `std`.

SmolLM2-135M-Instruct, v_proj of the last six layers, directions of each example's own, on four tasks made of
TREC's questions, whose losses differ in scale, and in how many positions they are of, and on three others:

    type    the kind of answer, among six words
    open    the same words, among all tokens of the vocabulary
    number  whether the answer is a number: yes or no
    text    the question itself, each token from those before it
    rotten-tomatoes, bbc, sms    see parts/methods/data.py

Each task trains with each rate of a grid, half a decade apart, for as many steps from the same weights. What
a rate gains is the fall of the test loss, as a share of the most that any rate of either way gives that task.

    python benchmarks/normalize.py                          an hour of processor time
    python benchmarks/normalize.py --steps 16 --batch-size 4 --rates 4 --test-examples 24    minutes
    python benchmarks/normalize.py --tasks type rotten-tomatoes bbc sms
    python benchmarks/normalize.py --report                 runs nothing, prints what there is

A finished run is a line in --out; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parts.common.machine import describe
from parts.methods.data import load_splits
from parts.methods.report import Results
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import tezo_ds
from tezo_ds.errors import ProbeError
from tezo_ds.tasks import Example, batch_indices, collate, encode, first_tokens, load_task

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache/methods"  # of the tasks that are not of TREC
OF_TREC = ("type", "open", "number", "text")
TASKS = (*OF_TREC, "rotten-tomatoes", "bbc", "sms")
MOST_TOKENS = 64
CENTRE = {"none": 3e-4, "std": 3e-5}  # about the middle of what trains


class Task:
    """One task's batches: (question, word) pairs, or texts alone."""

    def __init__(self, name: str, folder: Path, tokenizer: Any, examples: int) -> None:
        self._name, self._tokenizer = name, tokenizer
        if name in OF_TREC:
            data, test = str(folder / "train.jsonl"), str(folder / "test.jsonl")
            found: Any = load_task(
                "trec", data=data, test_data=test, test_examples=examples, template="{text} Answer:"
            )
        else:
            found = load_splits(name, CACHE, 1, examples)
        self.before = 0.0  # loss of the model's own weights; 0: not measured yet
        self.train, self.test = (
            [self._made(e) for e in part] for part in (found.train, found.test)
        )
        self.choices: Tensor | None = None
        if name not in ("open", "text"):
            words = sorted({str(e.answer) for e in [*self.train, *self.test]})
            tokens = first_tokens(tokenizer, words, [self.train[0].prompt])
            assert tokens is not None, f"{words} are not of one token each"
            self.choices = torch.tensor(tokens)

    def _made(self, example: Example) -> Example:
        if self._name == "number":
            prompt = example.prompt.replace(" Answer:", " Is it a number?")
            return Example(prompt, example.label, "yes" if example.label == "NUM" else "no")
        if self._name == "text":
            return Example(example.prompt.removesuffix(" Answer:"), None, None)
        return example

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Returns examples as a batch, (B, T) each tensor."""
        return collate(
            encode(self._tokenizer, examples, MOST_TOKENS), int(self._tokenizer.pad_token_id)
        )


def run(task: Task, model: Any, key: dict[str, Any]) -> dict[str, Any]:
    """Trains from the model's own weights, which no step writes, and returns losses before and after."""
    start = time.process_time()
    fields = {
        "lr": key["lr"], "normalize": key["normalize"], "placement": "per_example", "queries": key["queries"],
        "include": ("*v_proj*",), "exclude": ("layers:0-23",), "seed": key["seed"], "check_every": 0,
    }  # fmt: skip
    engine = tezo_ds.initialize(model, fields)
    engine.objective.choices = task.choices
    test = [task.batch(task.test[i : i + 32]) for i in range(0, len(task.test), 32)]
    task.before = task.before or _loss(engine, test)
    error = None
    try:
        for step in range(key["steps"]):
            places = batch_indices(len(task.train), key["batch_size"], step, key["seed"], 0, 1)
            engine.step(task.batch([task.train[i] for i in places]))
    except ProbeError as problem:
        error = str(problem)
    after = math.nan if error else _loss(engine, test)
    return {
        "before": task.before, "after": after if math.isfinite(after) else None, "error": error,
        "processor_seconds": time.process_time() - start,
    }  # fmt: skip


def _loss(engine: tezo_ds.Engine, batches: Sequence[dict[str, Tensor]]) -> float:
    return sum(engine.loss(batch) * len(batch["labels"]) for batch in batches) / sum(
        len(batch["labels"]) for batch in batches
    )


def rates_of(way: str, count: int) -> list[float]:
    """Returns rates half a decade apart, around the middle one of a way."""
    return [float(f"{CENTRE[way] * 10 ** (0.5 * (i - count // 2)):.2g}") for i in range(count)]


def keys_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the runs that the arguments ask for."""
    shared = {
        name: getattr(args, name)
        for name in ("steps", "batch_size", "queries", "seed", "test_examples")
    }
    return [
        {**shared, "model": args.model, "task": task, "normalize": way, "lr": rate}
        for task in args.tasks
        for way in CENTRE
        for rate in rates_of(way, args.rates)
    ]  # fmt: skip


def report(args: argparse.Namespace, results: Results, console: Console) -> None:
    """Prints, for each way and rate, what it gains on each task, and the rate that serves all best."""
    found = [record for key in keys_of(args) if (record := results.find(key)) is not None]
    falls = {
        (r["normalize"], r["lr"], r["task"]): -math.inf if r["after"] is None else r["before"] - r["after"]
        for r in found
    }  # fmt: skip
    most = {
        task: max((f for (_, _, t), f in falls.items() if t == task), default=0.0)
        for task in args.tasks
    }
    for way in CENTRE:
        table = Table("lr", *args.tasks, "least", title=f"normalize: {way}, share of the most")
        for rate in rates_of(way, args.rates):
            shares = [
                falls.get((way, rate, task), math.nan) / most[task]
                for task in args.tasks
                if most[task] > 0
            ]
            cells = ["< -1" if share < -1 else f"{share:.2f}" for share in shares]
            least = min(shares, default=math.nan)
            table.add_row(f"{rate:g}", *cells, "< -1" if least < -1 else f"{least:.2f}")
        console.print(table)
    for task in args.tasks:
        starts = [r["before"] for r in found if r["task"] == task]
        if starts:
            console.print(
                f"{task}: loss {starts[0]:.3f} before, at best {starts[0] - most[task]:.3f}"
            )
    seconds = sum(r["processor_seconds"] for r in found)
    console.print(f"{len(found)} of {len(keys_of(args))} runs, {seconds:.0f} processor seconds")


def add_sources(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a model and of TREC's questions."""
    add = parser.add_argument
    add("--model", default=".cache/quickstart/SmolLM2-135M-Instruct")
    data = ROOT / ".cache/quickstart/trec"
    add("--data", type=Path, default=data, help="folder of train.jsonl and test.jsonl")


def loaded(args: argparse.Namespace) -> tuple[Any, Any]:
    """Returns the tokenizer and the model that the options name."""
    folder = str(ROOT / args.model)  # the path itself where it is absolute
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder), model


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(OF_TREC))
    add("--rates", type=int, default=5, help="of each way, half a decade apart")
    add("--steps", type=int, default=100)
    add("--batch-size", type=int, default=8)
    add("--queries", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--test-examples", type=int, default=96)
    add_sources(parser)
    add("--out", type=Path, default=ROOT / "runs/normalize.jsonl", help="finished runs")
    add("--report", action="store_true", help="run nothing, report what there is")
    args = parser.parse_args(words)
    console, results = Console(soft_wrap=True, width=110), Results(args.out)
    console.print(describe())
    left = [] if args.report else [key for key in keys_of(args) if results.find(key) is None]
    if left:
        tokenizer, model = loaded(args)
        tasks = {name: Task(name, args.data, tokenizer, args.test_examples) for name in args.tasks}
        for key in left:
            done = run(tasks[key["task"]], model, key)
            results.add({**key, **done})
            after = math.nan if done["after"] is None else done["after"]
            console.print(
                f"{key['task']}, {key['normalize']}, lr {key['lr']:g}: {done['before']:.3f} to {after:.3f}"
            )
    report(args, results, console)


if __name__ == "__main__":
    main()
