"""Rows of one split as plain Python values, and where each of them is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """The rows of one split.

    Attributes:
        where: names the split in error messages.
        columns: names of the columns.
        rows: cells by column.
        parts: number of rows and name of each file, where the rows come from several.
    """

    where: str
    columns: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    parts: Sequence[tuple[int, str]] = ()

    def at(self, number: int) -> str:
        """Returns where a row is, from 1: its file and its number there."""
        for count, where in self.parts:
            if number <= count:
                return f"{where}, row {number}"
            number -= count
        return f"{self.where}, row {number}"


def joined(where: str, tables: Sequence[Table]) -> Table:
    """Returns the rows of several tables, one after the other; a column that one lacks is empty there."""
    columns = list(dict.fromkeys(column for table in tables for column in table.columns))
    rows = [{c: row.get(c) for c in columns} for table in tables for row in table.rows]
    return Table(where, columns, rows, [(len(table.rows), table.where) for table in tables])
