"""A heat map of matrices, layer by kind."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from tezo_ds.probing_layers.choice import Row


def draw(rows: Sequence[Row], batch: int, chosen: Sequence[str], picture: Path) -> None:
    """Draws, as a PNG, s / 2 tr H and the gain under noise of each matrix, on a logarithmic scale.

    A matrix whose gradient or curvature is not above 0 is white; a dot says that s is below its standard
    error. Chosen matrices have a frame.
    """
    os.environ.pop("MPLBACKEND", None)  # what a notebook left there may not be installed here
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    kinds = list(dict.fromkeys(row.kind.short for row in rows))
    layers = list(dict.fromkeys(row.layers for row in rows))
    figure = Figure(figsize=(3 + 0.9 * len(kinds), 2 + 0.19 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    titles = ("s / 2 tr H", f"gain of a step, batch {batch}")
    for axis, size, title in zip(figure.subplots(1, 2), (math.inf, batch), titles, strict=True):
        cells = [[math.nan] * len(kinds) for _ in layers]
        for row in rows:
            y, x = layers.index(row.layers), kinds.index(row.kind.short)
            value = row.figures.gains(size)[0].item()
            cells[y][x] = value if value > 0 else math.nan
            if value > 0 and row.figures.gradient < row.figures.errors[0]:
                axis.plot(x, y, ".", markersize=2, color="white")
            if row.kind.name in chosen:
                box = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="tab:red", lw=0.7)
                axis.add_patch(box)
        shown = [value for line in cells for value in line if value > 0]
        norm = LogNorm(min(shown, default=0.1), max(shown, default=1.0))
        image = axis.imshow(cells, aspect="auto", cmap="viridis", norm=norm)
        axis.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", fontsize=7)
        axis.set_yticks(range(len(layers)), layers, fontsize=6)
        axis.set_ylabel("layer")
        axis.set_title(title, fontsize=9)
        figure.colorbar(image, ax=axis, shrink=0.7)
    figure.savefig(picture, dpi=110)
