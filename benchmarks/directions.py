"""Many directions a step: what they see of the gradient, what they cost, and when they train faster.

SmolLM2-135M-Instruct on TREC's questions (see parts/methods/data.py). Sections, each by itself with --only:

    gradient   cosine between the estimate and the true coefficient gradient, against Q
    update     drawing τ, summing κτ and the update at OPT-30B's shape, for one rank of 1, 16, 128
    speed      time of a step over a plain forward of the same sequences, against Q
    training   loss and accuracy against steps and seconds for several Q, each at its best learning rate
    placement  four ranks with the same directions, and with directions of their own, on equal data

    python benchmarks/directions.py --only gradient update
    python benchmarks/directions.py                 all: hours on two cores, mostly training and placement
    python benchmarks/directions.py --report        only writes docs/directions.md and its pictures

What is finished is a line in OUT/results.jsonl and not repeated; Ctrl-C loses the one in progress. A
budget is counted in steps at a pace that is measured first, so a machine that is busy later changes
nothing.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import time
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from parts.common.machine import describe
from parts.directions import report
from parts.directions.gradient import agreement, differentiable
from parts.directions.speed import add_arguments, overhead, update_cost
from parts.directions.training import CHUNK, Curves, Way, points_of
from parts.methods import training as methods_training
from parts.methods.data import load_splits
from parts.methods.report import Record, Results, best_rate, put_between_markers
from parts.methods.training import Settings, Weights, choice_loss
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
TASK = "trec"
TUNING_SEED, GRADIENT_SEED = 0, 0  # of final runs 1, 2, …
SECTIONS = ("gradient", "update", "speed", "training", "placement")
RANKS = 4


class Benchmark:
    """The sections that the arguments ask for, and what of them is finished."""

    def __init__(self, args: argparse.Namespace, results: Results, console: Console) -> None:
        self._args, self._results, self._console = args, results, console
        a = args
        self.settings = Settings(
            a.budget,
            a.batch_size,
            a.train_examples,
            a.valid_examples,
            a.test_examples,
            dtype=a.dtype,
        )
        self.ways = {
            "training": [Way(f"Q = {q}", q) for q in a.queries],
            "placement": [
                way
                for q in a.placement_queries
                for way in (Way(f"shared, q = {q}", q), Way(f"per_rank, q = {q}", q, RANKS))
            ],
        }

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        """The model in float32."""
        return self._load("float32")

    def _load(self, dtype: str) -> PreTrainedModel:
        folder = str(ROOT / self._args.model)  # the path itself where it is absolute
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        )
        return model

    def trainer(self, settings: Settings) -> Curves:
        """Makes a trainer on the benchmark's data and model, in the dtype of the settings."""
        model = self.model if settings.dtype == "float32" else self._load(settings.dtype)
        importlib.import_module("tezo_ds.rng.compiled")  # compiles: not within a step's pace
        splits = load_splits(
            TASK, self._args.cache, self._args.valid_examples, self._args.test_examples
        )
        tokenizer = AutoTokenizer.from_pretrained(str(ROOT / self._args.model))
        made = Curves(model, tokenizer, splits, settings, Weights(model))
        made.ways = {way.name: way for ways in self.ways.values() for way in ways}
        return made

    @functools.cached_property
    def _trained(self) -> Curves:
        return self.trainer(self.settings)

    def key(self, section: str) -> Record:
        """Returns the fields that all runs of a section have in common."""
        a, fields = self._args, self.settings.fields()
        if section == "gradient":
            return {
                "section": section, "model": a.model, "batch_size": a.gradient_batch,
                "most": max(a.gradient_queries), "rank": fields["rank"], "rho": fields["rho"],
                "include": fields["include"],
            }  # fmt: skip
        if section == "speed":
            names = {"shape": a.speed_shape, "chunk": CHUNK, "rounds": a.speed_rounds}
            return {"section": section, "model": a.model, **names}
        if section == "update":
            return {"section": section, "queries": a.update_queries, "rank": 64}
        del fields["queries"]
        return {"section": section, "model": a.model, "rates": a.rates, **fields}

    def wanted(self, section: str) -> list[Record]:
        """Returns every record of a section as the fields that name it; the learning rate of a final run is
        None until all were tried."""
        a, key = self._args, self.key(section)
        if section == "gradient":
            return [{**key, "batch": batch} for batch in range(a.gradient_batches)]
        if section == "update":
            return [{**key, "world": world} for world in a.update_worlds]
        if section == "speed":
            return [{**key, "queries": queries} for queries in a.speed_queries]
        ways = self.ways[section]
        runs = [{**key, "way": way.name, "role": "pace"} for way in ways]
        rates = {way.name: self._rates(key, way) for way in ways}
        for tried in zip_longest(*rates.values()):  # of those that try fewer, None
            for name, lr in zip(rates, tried, strict=True):
                if lr is not None:
                    tuned = {"role": "tune", "lr": lr, "seed": TUNING_SEED}
                    runs.append({**key, "way": name, **tuned})
        for seed in range(a.seeds):
            for name, of_way in rates.items():
                best = best_rate(self._results, {**key, "way": name}, of_way, by_loss=True)
                runs.append({**key, "way": name, "role": "final", "lr": best, "seed": 1 + seed})
        return runs

    def _rates(self, key: Record, way: Way) -> list[float]:
        """Returns learning rates to try, as far as is known: beyond an end that was best there are more."""
        a, of_way = self._args, {**key, "way": way.name}
        indices = list(range(a.rates))
        while True:
            rates = [way.rate(index, a.rates) for index in indices]
            best = best_rate(self._results, of_way, rates, by_loss=True)
            at_end = best in (min(rates), max(rates))
            if not at_end or len(rates) == a.rates + a.more_rates:
                return rates
            indices.append(min(indices) - 1 if best == min(rates) else max(indices) + 1)

    def left(self) -> list[Record]:
        """Returns the runs of all sections that are not finished."""
        return [run for section in self._args.only for run in self._left(section)]

    def _left(self, section: str) -> list[Record]:
        return [run for run in self.wanted(section) if self._results.find(run) is None]

    def minutes_left(self) -> float:
        """Guesses the minutes left: budgets, and what judging and the other sections took on two cores."""
        seconds = 0.0
        for run in self.left():
            if run["section"] in self.ways:
                trains = run["role"] != "pace"
                seconds += self.settings.budget * trains + 30
            else:
                seconds += {"gradient": 90.0, "update": 10.0}.get(run["section"], 0.0)
                if run["section"] == "speed":
                    seconds += 2 * run["queries"] * (run["rounds"] + 2)
        return seconds / 60

    def run(self) -> None:
        """Runs all that is left, in order."""
        makers: dict[str, Callable[[Record], Record]] = {
            "gradient": self._gradient, "update": self._update, "speed": self._speed,
            "training": self._training, "placement": self._training,
        }  # fmt: skip
        for section in self._args.only:
            while left := self._left(section):  # again each time, as rates become known
                key = left[0]
                start = time.perf_counter()
                found = makers[section](key)
                made = {"machine": describe(), "took": time.perf_counter() - start}
                self._results.add({**key, **found, **made})
                named = {k: v for k, v in key.items() if k not in self.key(section)}
                self._console.print(
                    f"{section} {named}: {made['took']:.0f} s; {len(self.left())} left, about "
                    f"{self.minutes_left():.0f} min"
                )

    def _gradient(self, key: Record) -> Record:
        trainer, most = self._gradient_trainer, key["most"]
        engine = trainer.still(most)
        engine.step_index = key["batch"]  # other directions for each batch
        batch = trainer.batch(GRADIENT_SEED, key["batch"])
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.model.requires_grad_(False)
        try:
            with differentiable(engine) as leaf:
                loss = choice_loss(self.model, batch, trainer.choices)
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
        counts = [q for q in self._args.gradient_queries if q <= most]
        return agreement(engine, batch, loss, leaf, counts)

    @functools.cached_property
    def _gradient_trainer(self) -> Curves:
        a = self._args
        fields = (a.train_examples, a.valid_examples, a.test_examples)
        return self.trainer(Settings(0.0, a.gradient_batch, *fields))

    def _update(self, key: Record) -> Record:
        cost = update_cost(key["world"], key["queries"], key["rank"], self._args.update_rounds)
        return {**cost, "threads": torch.get_num_threads()}

    def _speed(self, key: Record) -> Record:
        return dict(overhead(self.model, key["queries"], key["shape"], key["chunk"], key["rounds"]))

    def _training(self, key: Record) -> Record:
        trainer, section = self._trained, key["section"]
        if key["role"] == "pace":
            names = [r["way"] for r in self._left(section) if r["role"] == "pace"]
            paces = trainer.paces(names)
            for name in names[1:]:  # the first is what was asked for
                self._results.add({**key, "way": name, "step_seconds": paces[name]})
            return {"step_seconds": paces[key["way"]]}
        steps = {way.name: self._steps(section, way) for way in self.ways[section]}
        least, mine = min(steps.values()), steps[key["way"]]
        seconds = {"step_seconds": self._pace(section, key["way"])}
        if key["role"] == "tune":
            tuned = trainer.run(key["way"], key["lr"], key["seed"], "tune", mine)
            return {"loss": tuned.loss, "accuracy": tuned.accuracy, "steps": tuned.steps, **seconds}
        curve = trainer.curve(key["way"], key["lr"], key["seed"], points_of(mine, least))
        return {"curve": curve, "least": least, **seconds}

    def _steps(self, section: str, way: Way) -> int:
        """Returns how many steps fit into the budget. Both ways of placement get as many: on ranks of their
        own both take as long, since each rank then runs as many sequences."""
        name = way.name if way.ranks == 1 else f"shared, q = {way.queries}"
        return max(1, round(self.settings.budget / self._pace(section, name)))

    def _pace(self, section: str, way: str) -> float:
        found = self._results.find({**self.key(section), "way": way, "role": "pace"})
        assert found is not None, "measured first"
        return float(found["step_seconds"])

    def found(self, section: str, role: str = "final") -> list[Record]:
        """Returns the records of a section for its tables; of runs that train, those of one role."""
        records = [self._results.find(run) for run in self.wanted(section)]
        return [r for r in records if r is not None and r.get("role", role) == role]

    def report(self, page: Path) -> None:
        """Writes tables into the page and pictures beside it, of all sections as far as they are finished."""
        titles = {
            "gradient": "What a step sees of the gradient", "update": "The update's own cost",
            "speed": "Time of a step", "training": "Training",
            "placement": f"{RANKS} ranks: the same directions, or of their own",
        }  # fmt: skip
        parts = []
        for section in SECTIONS:
            if not (records := self.found(section)):
                continue
            if section in self.ways:
                ways, picture = self.ways[section], page.with_name(f"directions-{section}.png")
                paced = section == "training"  # ranks are emulated in the other
                body = report.training(records, ways, paced)
                report.draw_training(records, ways, paced, picture)
                body += f"\n\n![curves]({picture.name})\n\n"
                body += report.tuning(self.found(section, "tune"), ways)
            elif section == "gradient":
                picture = page.with_name("directions-gradient.png")
                body = report.gradient(records)
                report.draw_gradient(records, picture)
                body += f"\n\n![cosine against Q]({picture.name})"
            else:
                body = {"update": report.update, "speed": report.speed}[section](records)
            machines = "; ".join(dict.fromkeys(record["machine"] for record in records))
            command = f"`python benchmarks/directions.py --only {section}{_seeds(records)}`"
            parts.append(f"### {titles[section]}\n\n{command}. Machine: {machines}.\n\n{body}")
        if parts:
            put_between_markers(page, "\n\n".join(parts), report.MARKERS)


def _seeds(records: Sequence[Record]) -> str:
    """Returns what a command says of seeds, where it has to."""
    most = max(int(record.get("seed", 1)) for record in records)
    return f" --seeds {most}" if most > 1 else ""


def arguments() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    add("--queries", nargs="+", type=int, default=[1, 4, 16, 64], help="Q of training")
    add("--placement-queries", nargs="+", type=int, default=[1, 4], help="of each of four ranks")
    add("--budget", type=float, default=150.0, help="seconds of each run of training")
    add("--seeds", type=int, default=1)
    add("--rates", type=int, default=3, help="learning rates to try, half a decade apart")
    add("--more-rates", type=int, default=3, help="at most, beyond an end that was best")
    add("--batch-size", type=int, default=4)
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of training")
    add("--valid-examples", type=int, default=100)
    add("--gradient-queries", nargs="+", type=int, default=[2**i for i in range(9)])
    add("--gradient-batches", type=int, default=3)
    add("--gradient-batch", type=int, default=2, help="examples")
    add_arguments(parser)
    methods_training.add_arguments(parser, "directions")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    args = arguments().parse_args(words)
    console = Console(soft_wrap=True)
    benchmark = Benchmark(args, Results(args.out / "results.jsonl"), console)
    if not args.report:
        console.print(f"{describe()}\n{len(benchmark.left())} runs left")
        try:
            benchmark.run()
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from here")
    benchmark.report(args.page)


if __name__ == "__main__":
    main()
