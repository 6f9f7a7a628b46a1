"""Successive halving: every setting runs a part of the steps, the better half goes on to twice as many."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SEED = "seed"


@dataclass(frozen=True)
class Trial:
    """A run of a sweep.

    Attributes:
        values: swept options and their values, as they were given, in their order.
        words: arguments of `tezo-ds train`, without --output.
    """

    values: tuple[tuple[str, str], ...]
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        pairs = ("=".join(pair) for pair in self.values)
        text = ",".join(pairs) or "run"
        return "".join(c if c.isalnum() or c in "=,.+-_" else "_" for c in text)

    @property
    def setting(self) -> tuple[tuple[str, str], ...]:
        """What is compared: all values but the seed, over which losses are averaged."""
        return tuple(pair for pair in self.values if pair[0] != SEED)


Setting = tuple[tuple[str, str], ...]
Losses = Mapping[Setting, Sequence["float | None"]]  # of each seed; None: the run failed


def by_setting(trials: Sequence[Trial]) -> dict[Setting, list[Trial]]:
    """Returns the runs of each setting, one for each seed."""
    found: dict[Setting, list[Trial]] = {}
    for trial in trials:
        found.setdefault(trial.setting, []).append(trial)
    return found


def rungs_of(steps: int, halvings: int, settings: int) -> list[int]:
    """Returns the steps after which settings are compared, the last of them `steps`: half, a quarter, … of
    it, as often as there is a half to drop."""
    most = math.ceil(math.log2(settings)) if settings > 1 else 0
    return sorted({max(1, steps >> times) for times in range(min(halvings, most) + 1)})


def mean_of(losses: Sequence[float | None]) -> float:
    """Returns the mean over seeds; infinite where one has failed, or is not finite."""
    known = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return statistics.fmean(known) if len(known) == len(losses) and known else math.inf


def ranked(losses: Losses) -> list[Setting]:
    """Returns settings by their mean loss, the best first; equal ones in the order they were given in."""
    return sorted(losses, key=lambda setting: mean_of(losses[setting]))


def better_half(losses: Losses) -> list[Setting]:
    """Returns the settings that go on, in the order they were given in: half of them, rounded up."""
    best = set(ranked(losses)[: math.ceil(len(losses) / 2)])
    return [setting for setting in losses if setting in best]
