"""This engine and its peers side by side on one model, data, seed and batch: time, memory, accuracy.

TeZO in one process and under ZeRO-3; LoRA and full AdamW under ZeRO-3; the loops of MeZO and LOZO; and the
evolution strategy of PyPI's eggroll-es where it is installed (pip install -e '.[bench]'). Every run has
processes of its own, which share the machine's cores, and measures in turn: the memory of steps at its
highest; seconds of a step and of plain inference of the same sequences; and, from the weights as they were
loaded, what as many steps learn as fit into the budget. The weights are judged in this process, in float32.

    python benchmarks/peers.py                            all; the machine should be otherwise quiet
    python benchmarks/peers.py --only "MeZO loop" tezo    some; finished runs are not repeated
    python benchmarks/peers.py --lr "MeZO loop=1e-4"      another rate is another run
    python benchmarks/peers.py --report                   only the table, the CSV and the picture

A run that was finished is a line in OUT/results.jsonl; Ctrl-C loses the one in progress.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from parts.common.backends import spawn
from parts.common.machine import describe
from parts.methods import training as methods_training
from parts.methods.data import load_splits
from parts.methods.report import Record, Results
from parts.methods.training import Settings, Trainer, Weights
from parts.peers.job import Job
from parts.peers.measure import RECORD, WEIGHTS, run
from parts.peers.report import report
from parts.peers.ways import WAYS
from rich.console import Console
from safetensors.torch import load_file
from step_overhead import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tezo_ds.tasks import batch_indices, encode, first_tokens

TASK = "trec"
# Of which nothing is chosen; by their loss the judge sees that weights are put back.
VALID_EXAMPLES = 8


class Peers:
    """The runs that the arguments ask for, those that are finished, and the rest."""

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        self._args, self._results = args, results
        self._settings = Settings(
            args.budget, args.batch_size, args.train_examples, VALID_EXAMPLES, args.test_examples,
            rho=args.rho, dense_rho=args.dense_rho, dtype=args.dtype,
        )  # fmt: skip

    def _key(self, way: str, ranks: int, copies: int, lr: float, settings: Settings) -> Record:
        """Returns the fields that name a run."""
        named = {"way": way, "ranks": ranks, "copies": copies, "lr": lr, "seed": self._args.seed}
        return {**named, "task": TASK, "model": self._args.model, **settings.fields()}

    def wanted(self, names: Iterable[str]) -> Iterator[Record]:
        """Yields every run of some ways: no training, plain inference of each kind, trainings, and what all
        weights cost."""
        ways = {name: WAYS[name] for name in names}
        yield self._key("no training", 1, 1, 0, self._settings)
        for ranks, copies in sorted({(way.ranks, way.copies) for way in ways.values()}):
            yield self._key("inference", ranks, copies, 0, replace(self._settings, budget=0))
        for place in (0, 1):
            for name, way in ways.items():
                if place < len(way.includes):
                    budget = self._settings.budget if place == 0 else 0
                    s = replace(self._settings, include=way.includes[place], budget=budget)
                    yield self._key(name, way.ranks, way.copies, self._args.lr[name], s)

    def left(self) -> list[Record]:
        """Returns the runs that are asked for and not finished."""
        wanted = self.wanted(self._args.only)
        return [key for key in wanted if self._results.find(key) is None]

    def finished(self) -> list[Record]:
        """Returns the records of all ways with these settings, also of ways that are not asked for now."""
        found = [self._results.find(key) for key in self.wanted(WAYS)]
        return [record for record in found if record is not None]

    def run(self, console: Console) -> None:
        """Runs all that is left, in order."""
        bench = Bench(self._args, self._settings)
        for key in self.left():
            start = time.perf_counter()
            settings = replace(self._settings, include=tuple(key["include"]), budget=key["budget"])
            found = bench.judged() if key["way"] == "no training" else bench.run(key, settings)
            self._results.add({**key, **found, "machine": describe(), "time": time.time()})
            trains = f", {' '.join(key['include'])}" if key["way"] in WAYS else ""
            accuracy = f", accuracy {found['accuracy']:.1%}" if "accuracy" in found else ""
            console.print(
                f"{key['way']} on {key['ranks']}{trains}{accuracy}; took "
                f"{time.perf_counter() - start:.0f} s, {len(self.left())} runs left"
            )


class Bench:
    """The data and the judge of trained weights, which all runs share."""

    def __init__(self, args: argparse.Namespace, settings: Settings) -> None:
        self._args = args
        self._folder = str(ROOT / args.model)  # the path itself where it is absolute
        splits = load_splits(TASK, args.cache, VALID_EXAMPLES, args.test_examples)
        tokenizer = AutoTokenizer.from_pretrained(self._folder)
        count = min(settings.train_examples, len(splits.train))
        chosen = batch_indices(len(splits.train), count, 0, args.seed, 0, 1)
        examples = [splits.train[i] for i in chosen]
        self._examples = tuple(encode(tokenizer, examples, settings.max_length))
        self._pad = int(tokenizer.pad_token_id)
        words = list((splits.spec.verbalizers or {}).values())
        tokens = first_tokens(tokenizer, words, [e.prompt for e in splits.train])
        assert tokens is not None, f"{TASK}: words {words} are not of one token each"
        self._choices = torch.tensor(tokens)
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            self._folder, dtype=torch.float32
        )
        whole = replace(settings, dtype="float32")
        self._judge = Trainer(self._model, tokenizer, splits, whole, Weights(self._model))

    def judged(self) -> Record:
        """Judges the weights as they are: accuracy, 0 where the loss is not finite."""
        outcome = asdict(self._judge.judge("final"))
        fields = {name: outcome[name] for name in ("accuracy", "loss", "n", "seconds_judging")}
        return fields if fields["loss"] is not None else {**fields, "accuracy": 0.0}

    def run(self, key: Record, settings: Settings) -> Record:
        """Makes one run in processes of its own, and judges the weights if the run trained."""
        way = WAYS.get(key["way"])
        job = Job(
            key["way"] if way else None, key["ranks"], way is not None and way.backward,
            key["copies"], self._folder, settings, key["lr"], key["seed"], self._examples, self._pad,
            self._choices,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            try:
                spawn(job.ranks, "zero3", run, job, folder)  # which joins a world of one, too
            except KeyboardInterrupt:
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
            found: Record = json.loads(Path(folder, RECORD).read_text())
            if Path(folder, WEIGHTS).exists():
                self._judge.put_back()
                self._put(load_file(Path(folder, WEIGHTS)))
                found |= self.judged()
        return found

    @torch.no_grad()
    def _put(self, weights: dict[str, torch.Tensor]) -> None:
        parameters = dict(self._model.named_parameters())
        for name, weight in weights.items():
            parameters[name].copy_(weight)


def rates(words: Sequence[str]) -> dict[str, float]:
    """Returns learning rates by way, with those given as WAY=RATE in place of the ways' own."""
    found = {name: way.lr for name, way in WAYS.items()}
    for word in words:
        name, _, rate = word.rpartition("=")
        if name not in WAYS:
            raise argparse.ArgumentTypeError(f"--lr {word}: give WAY=RATE, WAY one of {list(WAYS)}")
        found[name] = float(rate)
    return found


def arguments() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    add("--budget", type=float, default=40.0, help="seconds of training of each run")
    add(
        "--lr",
        nargs="+",
        default=[],
        metavar="WAY=RATE",
        help="learning rates other than the default",
    )
    add("--seed", type=int, default=1)
    add("--batch-size", type=int, default=8, help="examples, over all ranks")
    add("--rho", type=float, default=1e-3)
    add("--dense-rho", type=float, default=5e-3, help="ρ of MeZO")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the weights")
    methods_training.add_arguments(parser, "peers")
    add("--no-page", dest="page", action="store_const", const=None, help="on the screen only")
    return parser


def checked(words: Sequence[str] | None, console: Console) -> argparse.Namespace:
    """Parses arguments; a peer that is not installed is left out with a line that says so."""
    parser = arguments()
    args = parser.parse_args(words)
    try:
        args.lr = rates(args.lr)
    except (argparse.ArgumentTypeError, ValueError) as error:
        parser.error(str(error))
    if "eggroll-es" in args.only and not args.report and not _installed("eggroll-es"):
        console.print("eggroll-es is not installed and left out; pip install -e '.[bench]' has it")
        args.only = [name for name in args.only if name != "eggroll-es"]
    return args


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def main(words: Sequence[str] | None = None) -> None:
    console = Console(soft_wrap=True)
    args = checked(words, console)
    peers = Peers(args, Results(args.out / "results.jsonl"))
    if not args.report:
        console.print(describe())
        console.print(f"{len(peers.left())} runs")
        try:
            peers.run(console)
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from here")
    report(peers.finished(), args.page, console)


if __name__ == "__main__":
    main()
