"""Training with many directions: curves over steps, each way paced as in `parts.methods.training`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tezo_ds
from parts.methods.training import Step, Trainer
from tezo_ds.engine.measuring import Measuring
from tezo_ds.errors import ProbeError

CHUNK = 32  # branches in one forward
MIDDLE = 2e-6  # a learning rate of one direction, for about a thousand steps
PACE_ROUNDS, MOST_STEPS = 3, 4


@dataclass(frozen=True)
class Way:
    """A way for a step to measure: Q directions, or as many on each of some ranks.

    Attributes:
        queries: Q of a rank.
        ranks: number of ranks that have directions of their own; 1: all measure the same.
    """

    name: str
    queries: int
    ranks: int = 1

    @property
    def directions(self) -> int:
        """Q of a step."""
        return self.queries * self.ranks

    def rate(self, index: int, count: int) -> float:
        """Returns one of `count` learning rates, half a decade apart around MIDDLE · Q^¾; others lie beyond.

        g's mean square falls like 1/Q while Q is well under D, so the best rate grows between √Q
        (what limits it is the noise of batches) and Q (of directions): all of that is tried.
        """
        exponent = 0.5 * (index - (count - 1) / 2)
        return float(f"{MIDDLE * self.directions**0.75 * 10**exponent:.2g}")


class RanksInTurn(Measuring):
    """Measuring on ranks with directions of their own, one after the other in one process.

    Exact, as nothing but losses travels between such ranks: each measures its directions on its
    examples, at coefficients that all share.
    """

    def __init__(self, engine: tezo_ds.Engine, ranks: int) -> None:
        super().__init__(
            engine.config,
            engine.sharding,
            engine.method,
            engine.probe,
            engine.objective,
            engine.run_state,
        )
        self._ranks = ranks
        self._rank: int | None = None  # whose turn it is

    def own(self, step: int) -> range:
        """Returns the directions of the rank whose turn it is, or of all."""
        count = self._config.queries_at(step)
        if self._rank is None:
            return range(self._ranks * count)
        return range(self._rank * count, (self._rank + 1) * count)

    def losses(self, batch: Mapping[str, Any], step: int) -> Tensor:
        """Measures the losses of every rank on its part of the batch: float64 (ranks, branches)."""
        found = []
        for rank in range(self._ranks):
            self._rank = rank
            part = {key: value.tensor_split(self._ranks)[rank] for key, value in batch.items()}
            found.append(super().losses(part, step))
        self._rank = None
        return torch.cat(found)


class Curves(Trainer):
    """A `Trainer` of ways to measure instead of methods, which also judges along the way."""

    ways: Mapping[str, Way] = {}
    _way: Way | None = None

    def paces(self, methods: Sequence[str]) -> dict[str, float]:
        """Measures paces as `Trainer` does, of ways, but by few steps where a way has many directions."""
        taken: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(PACE_ROUNDS):
            for name in methods:
                with self._started(name, 1e-12, 0) as (step, _engine):
                    step(0)
                    for index in range(1, 1 + max(1, MOST_STEPS // self.ways[name].directions)):
                        start = time.perf_counter()
                        step(index)
                        taken[name].append(time.perf_counter() - start)
        return {name: statistics.median(seconds) for name, seconds in taken.items()}

    def curve(self, way: str, lr: float, seed: int, points: Sequence[int]) -> list[dict[str, Any]]:
        """Trains, and judges by the test examples after each number of steps in `points`; ends early where
        a loss is not finite."""
        self.put_back()
        found, done = [], 0
        with self._started(way, lr, seed) as (step, engine):
            for until in points:
                try:
                    for index in range(done, until):
                        step(index)
                except ProbeError:
                    break
                judged, done = self.judge("final", engine), until
                found.append({"steps": until, "loss": judged.loss, "accuracy": judged.accuracy})
        return found

    def still(self, queries: int) -> tezo_ds.Engine:
        """Makes an engine that measures and does not move."""
        s = self._settings
        fields = {"rank": s.rank, "rho": s.rho, "include": s.include, "check_every": 0}
        return self._engine({**fields, "lr": 0.0, "queries": queries, "branch_chunk": CHUNK})

    def batch(self, seed: int, step: int) -> dict[str, Tensor]:
        """Returns the batch that a run of this seed sees at a step."""
        return self._batches(seed)(step)

    @property
    def choices(self) -> Tensor:
        """The task's words, int64 (words,)."""
        return self._choices

    @contextmanager
    def _started(self, method: str, lr: float, seed: int) -> Iterator[tuple[Step, tezo_ds.Engine]]:
        self._way = self.ways[method]
        try:
            with super()._started("tezo", lr, seed) as started:
                yield started
        finally:
            self._way = None

    def _engine(self, fields: dict[str, Any]) -> tezo_ds.Engine:
        way = self._way
        if way is None:
            return super()._engine(fields)
        engine = super()._engine({**fields, "queries": way.queries, "branch_chunk": CHUNK})
        if way.ranks > 1:
            engine.measuring = RanksInTurn(engine, way.ranks)
        return engine


def points_of(steps: int, least: int, pieces: int = 6) -> list[int]:
    """Returns numbers of steps to judge after: none, equal parts of all, and what the slowest way makes."""
    parts = {round(steps * i / pieces) for i in range(pieces + 1)}
    return sorted({0, *parts, min(steps, least)})
