"""README's picture of the quickstart, docs/quickstart.svg, from the numbers in docs/quickstart.csv.

    python launch/quickstart_picture.py

The numbers were printed by the commands beside them; this draws, and measures nothing.
"""

from __future__ import annotations

import csv
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLOURS = {"none": "#9aa5b1", "forwards": "#2f6f9f", "backpropagation": "#c9883a"}
# Text stays text, and nothing in the file depends on when or where it was drawn.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "tezo_ds", "font.size": 10.0}


def rows() -> list[dict[str, str]]:
    """Returns the measured lines, each with what printed it."""
    with (DOCS / "quickstart.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def percent(row: dict[str, str]) -> str:
    """Returns a row's accuracy as README writes it."""
    return f"{100 * float(row['accuracy']):.1f} %"


def told(row: dict[str, str]) -> str:
    """Returns what a row is of, with the time that it took where that was measured."""
    return row["what"] + (f", {row['seconds']} s" if row["seconds"] else "")


def draw(path: Path) -> None:
    """Draws a bar for each measured line, in the order of the table."""
    found = rows()[::-1]
    names = [textwrap.fill(told(row), 42) for row in found]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.1), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        values = [100 * float(row["accuracy"]) for row in found]
        bars = axes.barh(names, values, color=[COLOURS[row["kind"]] for row in found])
        axes.bar_label(bars, [percent(row) for row in found], padding=3)
        axes.set_xlim(0, 100)
        axes.set_xlabel("accuracy on 400 held-out questions, %")
        axes.spines[["top", "right"]].set_visible(False)
        kinds = [kind for kind in COLOURS if kind != "none"]
        handles = [bars[[row["kind"] for row in found].index(kind)] for kind in kinds]
        axes.legend(handles, kinds, frameon=False, loc="upper right")
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(DOCS / "quickstart.svg")
