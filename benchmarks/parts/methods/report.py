"""Results of `benchmarks/methods.py` so far: kept as JSON lines, chosen from, tabled and drawn."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from parts.common.pictures import load_pyplot
from parts.common.tables import markdown_table

# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SEEDS = 1 + len(T_QUANTILES)
BEGIN, END = "<!-- benchmarks/methods.py: begin -->", "<!-- benchmarks/methods.py: end -->"
BASE = "tezo-adam-coef"  # ours, with which the others are compared
COLUMNS = ("method", "lr", "acc. %", "± 95 %", "seeds", "vs coef", "steps", "s/step", "MB")

Record = dict[str, Any]


class Results:
    """A file of one JSON line for each finished run; a line that was cut short is dropped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records: list[Record] = []
        if not path.exists():
            return
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        self.records = [json.loads(line) for line in whole.splitlines()]

    def find(self, key: Record) -> Record | None:
        """Returns the run with these fields, if it was finished before."""
        return next(iter(self.find_all(key)), None)

    def find_all(self, key: Record) -> list[Record]:
        """Returns the runs with these fields that were finished before."""
        return [r for r in self.records if all(r.get(name) == key[name] for name in key)]

    def add(self, record: Record) -> None:
        """Writes a record's line at once."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            print(json.dumps(record), file=file)
        self.records.append(record)


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean, and half the width of its 95 % interval by Student's t; None for a single value."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, None
    quantile = T_QUANTILES[len(values) - 2]
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def best_rate(
    results: Results, key: Record, rates: Sequence[float], by_loss: bool = False
) -> float | None:
    """Returns the learning rate that validated best: by accuracy, of equals by loss. None until all ran.

    Args:
        results: the results so far.
        key: the fields that all runs of this task and method share.
        rates: the candidates.
        by_loss: whether loss comes first, and of equals accuracy.
    """
    tried = [results.find({**key, "role": "tune", "lr": rate}) for rate in rates]
    found = [record for record in tried if record is not None]
    if len(found) < len(rates):
        return None
    best = max(found, key=lambda record: _goodness(record)[:: -1 if by_loss else 1])
    return float(best["lr"])


def _goodness(record: Record) -> tuple[float, float]:
    loss = record["loss"]  # None where it was not finite
    return record["accuracy"], -math.inf if loss is None else -loss


@dataclass(frozen=True)
class Line:
    """One method on one task, over the seeds that are finished; `less` is its accuracy less that of BASE
    from the same seeds, and half of that difference's interval."""

    task: str
    method: str
    lr: float | None
    mean: float
    half: float | None
    seeds: int
    steps: float | None = None
    step_seconds: float | None = None
    peak_bytes: int | None = None
    n: int = 0
    less: tuple[float, float | None] | None = None

    def cells(self) -> list[str]:
        """Returns the line's cells, by COLUMNS."""
        half = "" if self.half is None else f"{100 * self.half:.1f}"
        return [
            self.method, "" if self.lr is None else f"{self.lr:.2g}", f"{100 * self.mean:.1f}", half,
            str(self.seeds or ""), _points(self.less), "" if self.steps is None else f"{self.steps:.0f}",
            "" if self.step_seconds is None else f"{self.step_seconds:.2f}",
            "" if self.peak_bytes is None else f"{self.peak_bytes / 1e6:.0f}",
        ]  # fmt: skip


def _points(less: tuple[float, float | None] | None) -> str:
    if less is None:
        return ""
    mean, half = less
    return f"{100 * mean:+.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def _less(runs: Sequence[Record], base: Sequence[Record]) -> tuple[float, float | None] | None:
    theirs = {run["seed"]: run["accuracy"] for run in base}
    shared = [run["accuracy"] - theirs[run["seed"]] for run in runs if run["seed"] in theirs]
    return interval(shared) if shared and runs is not base else None


def summarise(runs: Sequence[Record], peak: Record | None, base: Sequence[Record] = ()) -> Line:
    """Returns the line of some final runs of one task and method, which differ in their seeds; `base` are the
    runs of BASE."""
    mean, half = interval([run["accuracy"] for run in runs])
    steps = [run["steps"] for run in runs]
    first = runs[0]
    return Line(
        first["task"], first["method"], first["lr"], mean, half, len(runs) if any(steps) else 0,
        statistics.mean(steps) or None,
        first.get("step_seconds"),
        peak["peak_bytes"] if peak else None, first["n"], _less(runs, base),
    )  # fmt: skip


def tables(lines: Sequence[Line]) -> list[Table]:
    """Makes tables for the screen, one a task."""
    made = []
    for task in dict.fromkeys(line.task for line in lines):
        table = Table(title=task)
        for column in COLUMNS:
            table.add_column(column, no_wrap=True)
        for line in lines:
            if line.task == task:
                table.add_row(*line.cells())
        made.append(table)
    return made


def markdown(lines: Sequence[Line], command: str, machines: Sequence[str], setting: str) -> str:
    """Returns the text between the page's markers."""
    parts = [f"`{command}`", setting, *(f"Machine: {machine}." for machine in machines)]
    for task in dict.fromkeys(line.task for line in lines):
        of_task = [line for line in lines if line.task == task]
        parts.append(f"### {task}, {of_task[0].n} test examples")
        parts.append(markdown_table(COLUMNS, [line.cells() for line in of_task]))
    return "\n\n".join(parts)


def put_between_markers(page: Path, content: str, markers: tuple[str, str] = (BEGIN, END)) -> None:
    """Replaces what stands between two markers in a page, and nothing else.

    Raises:
        ValueError: the page has not one of the first and then one of the second.
    """
    first, last = markers
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end or first in rest or last in after:
        raise ValueError(f"{page}: needs the lines {first} and {last}, once each, for the tables")
    page.write_text(f"{before}{first}\n{content}\n{last}{after}", encoding="utf-8")


def draw(lines: Sequence[Line], lowest: str, highest: str, picture: Path) -> None:
    """Draws accuracy by method with intervals, a panel a task; two of the methods as lines across.

    Args:
        lines: lines of all tasks.
        lowest: the method that stands for no training.
        highest: the method to compare with.
        picture: a PNG to write.
    """
    pyplot = load_pyplot()
    names = list(dict.fromkeys(line.task for line in lines))
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(4.5 * len(names), 4), layout="constrained", squeeze=False
    )
    for axis, task in zip(axes[0], names, strict=True):
        bars = [
            line for line in lines if line.task == task and line.method not in (lowest, highest)
        ]
        for line in bars:
            half = 100 * (line.half or 0)
            axis.errorbar(
                100 * line.mean, line.method, xerr=half, fmt="o", color="tab:blue", capsize=3
            )
        for method, style in ((lowest, ":"), (highest, "--")):
            for line in (line for line in lines if (line.task, line.method) == (task, method)):
                axis.axvline(100 * line.mean, color="black", linestyle=style, label=method)
                if line.half is not None:
                    ends = 100 * (line.mean - line.half), 100 * (line.mean + line.half)
                    axis.axvspan(*ends, color="black", alpha=0.08)
        axis.invert_yaxis()
        axis.set_title(task)
        axis.set_xlabel("test accuracy, %")
        axis.grid(axis="x", alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
