"""α and β of a machine, fitted to the gathers that `benchmarks/scaling.py` timed alone.

A gather of n bytes over p ranks takes h·α + (p − 1)/p · n · β: h hops that wait for each other, and what
every rank receives. Hops and bytes between machines have constants of their own. Where ranks outnumber the
processors they take turns, and everything takes as many times as long. Errors are relative, and squares of
these are made least.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parts.methods.report import Record

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Form:
    """Growth of a gather's seconds with its ranks.

    Attributes:
        name: name in tables.
        hops: hops of n ranks, or n machines; 0 of one.
        turns: whether ranks beyond the processors take turns.
    """

    name: str
    hops: Callable[[int], int]
    turns: bool = True


RING = Form("ring, p − 1 hops", lambda n: n - 1)  # the one that `tezo-ds plan` has
FORMS = (
    RING,
    Form("tree, ⌈log₂ p⌉ hops", lambda n: (n - 1).bit_length()),
    Form("one hop for any p", lambda n: min(1, n - 1)),
    Form("ring, each rank as if it had a processor", RING.hops, turns=False),
)


@dataclass(frozen=True)
class Fit:
    """Fitted constants of a form.

    Attributes:
        form: the form.
        constants: (4,), seconds a hop inside of a machine and between, and a byte inside and between; 0
            where no row has such, or where it came out below 0.
    """

    form: Form
    constants: Array

    def seconds(self, record: Record) -> float:
        """Predicts the seconds that the gathers of a row would take alone."""
        return float(terms(record, self.form) @ self.constants)

    def errors(self, records: Sequence[Record]) -> list[float]:
        """Returns the error of each row: predicted over measured, less 1."""
        return [self.seconds(r) / r["gathers_alone_s"] - 1 for r in records]


@dataclass(frozen=True)
class LeftOut:
    """A row, and what was predicted of it by constants of other worlds and shardings alone."""

    record: Record
    predicted: float

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return float(self.predicted / self.record["gathers_alone_s"] - 1)


def terms(record: Record, form: Form) -> Array:
    """Returns what the constants are multiplied with: hops inside and between machines, bytes a rank receives
    from its own machine and from others. (4,)

    Args:
        record: a row of the CSV of `benchmarks/scaling.py`.
        form: the form that counts the hops.
    """
    ranks, bytes_ = record["gather_ranks"], record["gather_bytes"]
    machines = max(1, ranks * record["nodes"] // record["world"])
    between = form.hops(machines)
    received = bytes_ * (ranks - 1) / ranks
    # A ring has one rank of each machine receive from another, and is as fast as its slowest link.
    shares = (0.0, received) if machines > 1 else (received, 0.0)
    hops = (record["gather_calls"] * n for n in (form.hops(ranks) - between, between))
    turns = record["world"] / record["workers"] if form.turns else 1.0
    return turns * np.array([*hops, *shares])


def usable(records: Sequence[Record]) -> list[Record]:
    """Returns the rows that have gathers between ranks."""
    return [r for r in records if r["gather_ranks"] > 1 and r["gathers_alone_s"] > 0]


def fit(records: Sequence[Record], form: Form) -> Fit:
    """Fits a form by least squares; none of the constants is below 0.

    Args:
        records: rows of `usable`, of one machine and backend.
        form: the form to be fitted.

    Raises:
        ValueError: the rows do not tell the constants from each other.
    """
    seconds = np.array([r["gathers_alone_s"] for r in records])
    rows = np.array([terms(r, form) for r in records]).reshape(len(records), 4) / seconds[:, None]
    asked = [column for column in range(4) if rows[:, column].any()]
    scale = np.linalg.norm(rows[:, asked], axis=0)
    if not asked or np.linalg.matrix_rank(rows[:, asked] / scale, tol=1e-6) < len(asked):
        raise ValueError(
            f"{len(records)} rows with gathers do not tell hops from bytes; measure more worlds and shardings"
        )
    constants = np.zeros(4)
    while asked:
        scale = np.linalg.norm(rows[:, asked], axis=0)
        found, *_ = np.linalg.lstsq(rows[:, asked] / scale, np.ones(len(rows)), rcond=None)
        if found.min() >= 0:
            constants[asked] = found / scale
            break
        del asked[int(found.argmin())]
    return Fit(form, constants)


def left_out(records: Sequence[Record], form: Form) -> list[LeftOut]:
    """Predicts every row without the rows of its world and sharding; leaves out rows that the others do not
    tell enough of."""
    found = []
    for one in dict.fromkeys(map(_kind, records)):
        mine = [r for r in records if _kind(r) == one]
        try:
            others = fit([r for r in records if _kind(r) != one], form)
        except ValueError:
            continue
        found += [LeftOut(r, others.seconds(r)) for r in mine]
    return found


def _kind(record: Record) -> tuple[Any, ...]:
    return record["sharding"], record["world"], record["nodes"]


def typical(errors: Sequence[float]) -> float:
    """Returns the median of the errors' sizes."""
    return statistics.median(map(abs, errors))
