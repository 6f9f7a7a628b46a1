"""Charts as inline SVG, for pages that load nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 240  # units of the drawing, which fits its column
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 36  # margins, where the scales stand
MOST = 600  # points of a line that are drawn

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points of one colour.

    Attributes:
        name: its name in the legend; "" leaves it out.
        points: (x, y), finite, by x.
        colour: number of a colour of the page.
        look: a line, a faint line behind others, or dots that a line joins.
    """

    name: str
    points: Sequence[Point]
    colour: int
    look: str = "line"


def chart(title: str, series: Sequence[Series]) -> str:
    """Returns a figure of HTML with the series over steps; "" where no series has a point."""
    points = [point for one in series for point in one.points]
    if not points:
        return ""
    xs, ys = _scale([x for x, _ in points]), _scale([y for _, y in points])

    def at(point: Point) -> str:
        x = LEFT + (point[0] - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (point[1] - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = [_tick_y(y, at((xs[0], y))) for y in ys] + [_tick_x(x, at((x, ys[0]))) for x in xs]
    for one in series:
        kept = one.points[:: math.ceil(len(one.points) / MOST) or 1]
        path = " ".join(map(at, kept))
        parts.append(f'<polyline class="s{one.colour} {escape(one.look)}" points="{path}"/>')
        if one.look == "dots":
            for point in kept:
                x, y = at(point).split(",")
                parts.append(f'<circle class="s{one.colour}" cx="{x}" cy="{y}" r="3.5"/>')
    names = "".join(
        f'<span class="k{one.colour}">{escape(one.name)}</span>' for one in series if one.name
    )
    return (
        f'<figure><figcaption>{escape(title)} {names}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{escape(title)} by step">{"".join(parts)}</svg></figure>'
    )


def _tick_y(value: float, place: str) -> str:
    x, y = place.split(",")
    return (
        f'<line class="grid" x1="{x}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        f'<text class="y" x="{LEFT - 8}" y="{float(y) + 4:.1f}">{value:g}</text>'
    )


def _tick_x(value: float, place: str) -> str:
    x, _ = place.split(",")
    return f'<text class="x" x="{x}" y="{HEIGHT - 12}">{value:g}</text>'


def _scale(values: Sequence[float]) -> list[float]:
    """Returns round numbers, evenly spaced, from at most the least to at least the greatest value."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # where floats tell nothing apart
        room = abs(low) / 2 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(round_ * power for round_ in (1, 2, 5, 10) if round_ * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{step * i:.12g}") for i in range(first, max(last, first + 1) + 1)]
