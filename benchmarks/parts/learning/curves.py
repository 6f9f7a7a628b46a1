"""How the loss of a run's batches fell, by seconds, by sequences and by gathers."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parts.common.pictures import load_pyplot
from parts.learning.arms import Arm
from parts.methods.report import Record
from tezo_ds.config import TezoConfig

POINTS = 24  # spans of a budget, equal in its logarithm
FIRST = 0.01  # share of it that ends the first
AXES = ("processor seconds", "sequences through the layers that train", "gathers of these layers")


def per_step(config: dict[str, Any]) -> tuple[int, int]:
    """Returns how many sequences a step takes through the layers that train, and how many forwards, each of
    which would gather these layers once where they are sharded."""
    run = TezoConfig.model_validate(config["tezo"])
    solves, dense = run.facts.solves, run.method.startswith("mezo")
    scales = solves * (1 + len(run.step_scales))
    return config["batch_size"] * (run.branches + scales), (run.branches if dense else 1) + solves


def curve_of(run: Path, budget: float) -> list[list[float]]:
    """Returns [seconds, sequences, gathers, loss] of a run at the ends of spans of the budget.

    The loss is the mean over the span's batches, each as it was before its step. Seconds are those of steps,
    stretched to make the budget together, as other processes take turns with a run.
    """
    config = json.loads((run / "config.json").read_text())
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "kappa" in line]
    sequences, gathers = per_step(config)
    pace = budget / sum(step["seconds"] for step in steps)
    points: list[list[float]] = []
    taken, span, losses = 0.0, 0, []
    for number, step in enumerate(steps, start=1):
        taken += pace * step["seconds"]
        losses.append(step["loss"])
        reached = sum(taken >= budget * FIRST ** (1 - i / POINTS) for i in range(POINTS + 1))
        if reached > span or number == len(steps):
            loss = statistics.mean(losses)
            points.append([round(taken, 2), number * sequences, number * gathers, round(loss, 4)])
            span, losses = reached, []
    return points


def draw_curves(lines: Sequence[tuple[str, Arm, list[Record]]], picture: Path) -> bool:
    """Draws the curves that runs have into a PNG, a row a task, and returns whether there are any."""
    with_curves = [
        (task, arm, runs)
        for task, arm, all_runs in lines
        if (runs := [run for run in all_runs if run.get("curve")])
    ]
    if not with_curves:
        return False
    tasks = list(dict.fromkeys(task for task, _, _ in with_curves))
    names = list(dict.fromkeys(arm.name for _, arm, _ in with_curves))
    pyplot = load_pyplot()
    size = (13, 3.1 * len(tasks))
    figure, axes = pyplot.subplots(
        len(tasks), len(AXES), figsize=size, layout="constrained", squeeze=False, sharey="row"
    )
    for task, arm, runs in with_curves:
        for column, axis in enumerate(axes[tasks.index(task)]):
            for run in runs:
                by = [point[column] for point in run["curve"]]
                loss = [point[-1] for point in run["curve"]]
                label = arm.name if run is runs[0] else None
                axis.plot(by, loss, color=f"C{names.index(arm.name)}", label=label)
            axis.set(xscale="log", xlabel=AXES[column])
            axis.grid(alpha=0.3)
    for task, row in zip(tasks, axes, strict=True):
        row[0].set_ylabel(f"{task}: loss of batches")
        row[0].legend()
    figure.savefig(picture, dpi=90)
    pyplot.close(figure)
    return True
