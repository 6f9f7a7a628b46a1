"""A run's loss and accuracy as a picture."""

from __future__ import annotations

import os
from pathlib import Path

from tezo_ds.run.folder import TEST, VALIDATION, read_metrics


def draw_curve(metrics: Path, picture: Path) -> None:
    """Draws training loss by step, or what was gained in its place, its running median, and where there is
    any the accuracy, or reward, on test and validation examples, as a PNG."""
    # What a notebook left there may not be installed here, and matplotlib would not be imported.
    os.environ.pop("MPLBACKEND", None)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, scores = read_metrics(metrics)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    finite = [line for line in steps if line["loss"] is not None]
    gained = any("reward" in line for line in finite)
    what, sign = ("reward", -1) if gained else ("loss", 1)
    x, values = [line["step"] + 1 for line in finite], [sign * line["loss"] for line in finite]
    axis.plot(x, values, color="tab:blue", alpha=0.3, linewidth=1, label=f"training {what}")
    axis.plot(x, running_median(values), color="tab:blue", label="running median")
    axis.set_xlabel("step")
    axis.set_ylabel(what)
    axis.grid(alpha=0.3)
    judged = read_metrics(metrics, VALIDATION)[1]
    found = {VALIDATION: judged, TEST: scores} if judged else {TEST: scores}
    if gained:
        for (part, lines), style in zip(found.items(), ("o-", "s"), strict=False):
            points = [line["step"] for line in lines], [-line[f"{part}_loss"] for line in lines]
            axis.plot(*points, style, color="tab:orange", label=f"{part} {what}")
    accurate = {
        part: [x for x in lines if x[f"{part}_accuracy"] is not None]
        for part, lines in found.items()
    }
    if any(accurate.values()):
        right = axis.twinx()
        for (part, lines), style in zip(accurate.items(), ("o-", "s"), strict=False):
            points = (
                [line["step"] for line in lines],
                [100 * line[f"{part}_accuracy"] for line in lines],
            )
            colour = "tab:green" if style == "s" else "tab:orange"
            right.plot(*points, style, color=colour, label=f"{part} accuracy")
        right.set_ylabel("accuracy, %" if judged else "test accuracy, %")
        right.set_ylim(0, 100)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(picture, dpi=120)


def running_median(values: list[float], width: int = 15) -> list[float]:
    """Returns the median of each value and those before it, `width` in all."""
    windows = (sorted(values[max(0, i - width + 1) : i + 1]) for i in range(len(values)))
    return [window[len(window) // 2] for window in windows]
