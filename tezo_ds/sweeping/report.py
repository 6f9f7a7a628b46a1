"""A sweep as a table, a picture, and the command of the best setting."""

from __future__ import annotations

import os
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from tezo_ds.sweeping.halving import Setting, Trial, mean_of, ranked
from tezo_ds.sweeping.runs import Sweep


def best_of(sweep: Sweep) -> Setting:
    """Returns the setting of the lowest mean loss after all steps."""
    last = sweep.rungs[-1]
    return ranked({each: sweep.losses(each, last) for each in sweep.left[last]})[0]


def table_of(sweep: Sweep) -> Table:
    """Returns a row for each setting: its losses as it went on, with their deviation over seeds."""
    title = f"mean {sweep.by} loss after so many steps"
    table, best = Table(box=None, padding=(0, 1), title=title, title_justify="left"), best_of(sweep)
    for name in dict(next(iter(sweep.trials))) or ("setting",):
        table.add_column(name, no_wrap=True)
    seeds = max(len(trials) for trials in sweep.trials.values())
    if seeds > 1:
        table.add_column("seeds", justify="right", no_wrap=True)
    for rung in sweep.rungs:
        table.add_column(f"after {rung}", justify="right", no_wrap=True)
    table.add_column("accuracy", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for setting, trials in sweep.trials.items():
        made = [rung for rung in sweep.rungs if setting in sweep.left[rung]]
        cells = [_cell(sweep.losses(setting, rung)) if rung in made else "" for rung in sweep.rungs]
        accuracies = sweep.accuracies(setting, made[-1])
        accuracy = f"{statistics.fmean(accuracies):.1%}" if accuracies else ""
        end = "dropped" if made[-1] != sweep.rungs[-1] else "best" if setting == best else ""
        names = [value for _, value in setting] or ["as given"]
        table.add_row(*names, *([str(len(trials))] if seeds > 1 else []), *cells, accuracy, end)
    return table


def _cell(losses: Sequence[float | None]) -> str:
    known = [loss for loss in losses if loss is not None]
    if mean_of(losses) == float("inf"):
        return "failed"
    spread = f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else ""
    return f"{mean_of(losses):.3f}{spread}"


def command_of(trial: Trial, output: Path) -> str:
    """Returns the command that makes a run alone, bit for bit."""
    return shlex.join(["tezo-ds", "train", *trial.words, "--output", str(output)])


def draw(sweep: Sweep, picture: Path) -> None:
    """Draws each setting's mean loss as it went on, as a PNG."""
    os.environ.pop("MPLBACKEND", None)  # what a notebook left there may not be installed here
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis, best = figure.subplots(), best_of(sweep)
    for setting in sweep.trials:
        rungs = [rung for rung in sweep.rungs if setting in sweep.left[rung]]
        means = [mean_of(sweep.losses(setting, rung)) for rung in rungs]
        name = ", ".join(" ".join(pair) for pair in setting) or "as given"
        axis.plot(rungs, means, "o-", label=name, linewidth=2.5 if setting == best else 1)
    axis.set_xlabel("steps")
    axis.set_ylabel(f"{sweep.by} loss, mean over seeds")
    axis.set_xticks(sweep.rungs)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", frameon=False)
    figure.savefig(picture, dpi=120)
