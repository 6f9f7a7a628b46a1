"""Rows that stay in memory-mapped Arrow files, as plain Python values one at a time."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from tezo_ds.tasks.table import Table

Row = Mapping[str, Any]
CHUNK = 256  # rows that a pass has in memory


class MappedRows(Sequence[Row]):
    """Rows of a data set of the library `datasets`, each decoded when it is asked for.

    Args:
        dataset: a `datasets.Dataset` on disk.
        decode: makes a row of what the data set has.
        kept: numbers of the rows that count, int64; None: all.
    """

    def __init__(
        self, dataset: Any, decode: Callable[[Row], Row], kept: np.ndarray | None = None
    ) -> None:
        self._dataset, self._decode, self._kept = dataset.with_format("arrow"), decode, kept

    def __len__(self) -> int:
        return len(self._dataset) if self._kept is None else len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        place = index if self._kept is None else int(self._kept[index])
        (row,) = self._dataset[place].to_pylist()
        return self._decode(row)

    def __iter__(self) -> Iterator[Row]:
        counts = None if self._kept is None else iter(self._kept.tolist())
        wanted = None if counts is None else next(counts, None)
        for number, row in enumerate(raw_rows(self._dataset)):
            if counts is None:
                yield self._decode(row)
            elif number == wanted:
                wanted = next(counts, None)
                yield self._decode(row)


def raw_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """Yields the rows of a data set in the format arrow, a few of them in memory at a time."""
    for start in range(0, len(dataset), CHUNK):
        yield from dataset[start : start + CHUNK].to_pylist()


class JoinedRows(Sequence[Row]):
    """Rows of several tables, one after the other; a column that one lacks is empty there."""

    def __init__(self, tables: Sequence[Table], columns: Sequence[str]) -> None:
        self._rows, self._columns = [table.rows for table in tables], columns
        self._ends = list(accumulate(len(rows) for rows in self._rows))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        part = bisect.bisect_right(self._ends, index)
        start = self._ends[part - 1] if part else 0
        return self._filled(self._rows[part][index - start])

    def __iter__(self) -> Iterator[Row]:
        return (self._filled(row) for rows in self._rows for row in rows)

    def _filled(self, row: Row) -> Row:
        return {column: row.get(column) for column in self._columns}


def joined_mapped(where: str, tables: Sequence[Table]) -> Table:
    """Returns the rows of several mapped tables, as `table.joined` does of those in memory."""
    columns = list(dict.fromkeys(column for table in tables for column in table.columns))
    parts = [(len(table.rows), table.where) for table in tables]
    return Table(where, columns, JoinedRows(tables, columns), parts)
