"""The tables of all pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(columns: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Returns a table in Markdown; a bar within a cell is escaped."""
    lines = ([str(cell).replace("|", "\\|") for cell in line] for line in (columns, *rows))
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, f"| {' | '.join(['---'] * len(columns))} |", *body])
