"""The tables of `benchmarks/gpu_check.py`: on the screen, and in docs/gpu-status.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from parts.common.tables import markdown_table
from parts.gpu_check.rows import FAILED, Row

MARKERS = "<!-- benchmarks/gpu_check.py: begin -->", "<!-- benchmarks/gpu_check.py: end -->"
COLUMNS = ("part", "check", "result", "found")


def table(rows: Sequence[Row]) -> Table:
    """Makes the screen's table."""
    made = Table(*COLUMNS, title="GPU check")
    for row in rows:
        style = "red" if row.status == FAILED else None
        made.add_row(row.part, escape(row.name), row.status, escape(row.told), style=style)
    return made


def markdown(found: Mapping[str, Any]) -> str:
    """Returns the page's text of one run, as gpu.json has it."""
    toy = (
        " Toy sizes, which show that the check runs, and nothing of a GPU." if found["toy"] else ""
    )
    lines = [f"{found['machine']}; {found['seconds']:.0f} s.{toy}", ""]
    rows = [(row["part"], row["name"], row["status"], row["told"]) for row in found["rows"]]
    lines.append(markdown_table(COLUMNS, rows))
    published = {
        f"{row['name'].split(':')[0]}: {seconds:g} s a step by {whose}": None
        for row in found["rows"]
        if row["part"] == "speed" and row["found"].get("published")
        for seconds, whose in [row["found"]["published"]]
    }
    if published:
        lines += ["", "Published, beside these: " + "; ".join(published) + "."]
    return "\n".join(lines)
