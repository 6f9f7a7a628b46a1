"""Cost of a step of many directions over a plain forward of its sequences, and of its update alone."""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from step_overhead import make_batch, measure
from transformers import PreTrainedModel

import tezo_ds
from tezo_ds.config import build
from tezo_ds.directions.branches import Ask
from tezo_ds.directions.space import CoefficientSpace, Matrix
from tezo_ds.methods import make_method

OPT_30B = [
    (f"layers.{layer}.{name}.weight", shape)
    for layer in range(48)
    for name, shape in (
        *((f"self_attn.{x}_proj", (7168, 7168)) for x in ("q", "k", "v", "out")),
        ("fc1", (28672, 7168)),
        ("fc2", (7168, 28672)),
    )
]


def overhead(
    model: PreTrainedModel, queries: int, shape: str, chunk: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Measures median seconds of a step with central and with forward differences, and over rounds the median
    and the range of its ratio to a plain forward of the same sequences, cut alike.

    Args:
        model: a model, all of whose matrices take part.
        queries: Q.
        shape: shape of a batch, "BxT".
        chunk: branches in one forward; 0: all.
        rounds: number of rounds, in each of which everything is timed in turn.
    """
    batch = make_batch(shape, model.config.vocab_size, "last")
    steps: dict[str, Callable[[], object]] = {}
    for difference in ("central", "forward"):
        fields = {"queries": queries, "difference": difference, "branch_chunk": chunk}
        engine = tezo_ds.initialize(model, {**fields, "lr": 1e-9, "check_every": 0})
        steps[f"plain {difference}"] = _plain(engine, batch, queries)
        steps[difference] = _step(engine, batch)
    seconds = measure(steps, rounds, f"Q = {queries}", quiet=False)
    found = {}
    for name in ("central", "forward"):
        plain = seconds[f"plain {name}"]
        ratios = sorted(a / b for a, b in zip(seconds[name], plain, strict=True))
        found[name] = {
            "seconds": statistics.median(seconds[name]),
            "plain": statistics.median(plain),
            "ratio": statistics.median(ratios),
            "least": ratios[0],
            "most": ratios[-1],
        }
    return found


def _plain(
    engine: tezo_ds.Engine, batch: dict[str, torch.Tensor], queries: int
) -> Callable[[], object]:
    c = engine.config
    ask = Ask.of(0, range(queries), 1.0, c.difference == "central")  # only their number counts
    parts = [len(part) for part in ask.parts(c.branch_chunk)]
    return lambda: [engine.objective(batch, branches) for branches in parts]


def _step(engine: tezo_ds.Engine, batch: dict[str, torch.Tensor]) -> Callable[[], object]:
    return lambda: engine.step(batch)


def update_cost(
    world: int, queries: int, rank: int, rounds: int, shapes: Sequence[Any] = OPT_30B
) -> dict[str, float]:
    """Measures processor seconds of what one of `world` ranks does for its share of Q directions, on torch's
    threads, without a model; what else the machine does counts little.

    Returns:
        draw: its own τ, which the probe needs before the forward; weigh: Σκτ of them; of one rank alone,
        too many to keep, so drawn again; update: g and the coefficients; coefficients: D.
    """
    importlib.import_module("tezo_ds.rng.compiled")  # compiles
    space = CoefficientSpace([Matrix(name, shape, rank) for name, shape in shapes], 0)
    method = make_method(build({"rank": rank}, "benchmark"), space, torch.device("cpu"))
    slopes = torch.randn(queries, dtype=torch.float64, generator=torch.manual_seed(0))
    own = range(queries // world)
    taken: dict[str, list[float]] = {"draw": [], "weigh": [], "update": []}
    for step in range(rounds + 1):
        start = time.process_time()
        space.taus(step, own)
        drawn = time.process_time()
        total = space.weighted(step, slopes, own)
        weighed = time.process_time()
        method.update(step, slopes, space.unweighted(total, slopes), 1e-6)
        ended = time.process_time()
        for name, seconds in zip(
            taken, (drawn - start, weighed - drawn, ended - weighed), strict=True
        ):
            if step:  # the first finds caches cold
                taken[name].append(seconds)
    found = {name: statistics.median(seconds) for name, seconds in taken.items()}
    # A mean, as small shares are drawn for several steps at once.
    return {**found, "draw": statistics.mean(taken["draw"]), "coefficients": space.numel}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of speed and update."""
    add = parser.add_argument
    add("--speed-queries", nargs="+", type=int, default=[1, 4, 16, 64], help="Q of speed")
    add("--speed-shape", default="4x32", help="examples x tokens of speed")
    add("--speed-rounds", type=int, default=7)
    add("--update-queries", type=int, default=1024, help="Q of update")
    add("--update-worlds", nargs="+", type=int, default=[1, 16, 128])
    add("--update-rounds", type=int, default=16)
