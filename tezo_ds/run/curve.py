"""A run's loss and accuracy as a picture."""

from __future__ import annotations

import os
from pathlib import Path

from tezo_ds.run.folder import read_metrics


def draw_curve(metrics: Path, picture: Path) -> None:
    """Draws training loss by step, its running median, and test accuracy where there is any, as a PNG."""
    # What a notebook left there may not be installed here, and matplotlib would not be imported.
    os.environ.pop("MPLBACKEND", None)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, scores = read_metrics(metrics)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    finite = [line for line in steps if line["loss"] is not None]
    x, loss = [line["step"] + 1 for line in finite], [line["loss"] for line in finite]
    axis.plot(x, loss, color="tab:blue", alpha=0.3, linewidth=1, label="training loss")
    axis.plot(x, _running_median(loss), color="tab:blue", label="running median")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.3)
    accurate = [line for line in scores if line["test_accuracy"] is not None]
    if accurate:
        right = axis.twinx()
        points = (
            [line["step"] for line in accurate],
            [100 * line["test_accuracy"] for line in accurate],
        )
        right.plot(*points, "o-", color="tab:orange", label="test accuracy")
        right.set_ylabel("test accuracy, %")
        right.set_ylim(0, 100)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(picture, dpi=120)


def _running_median(values: list[float], width: int = 15) -> list[float]:
    windows = (sorted(values[max(0, i - width + 1) : i + 1]) for i in range(len(values)))
    return [window[len(window) // 2] for window in windows]
