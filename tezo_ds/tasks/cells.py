"""Cells of a table as texts, and what is said of those that cannot be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tezo_ds.errors import DataError
from tezo_ds.tasks.table import Table


def check_column(table: Table, column: str, named_by: str) -> None:
    """Raises DataError where a table has no such column; `named_by` is what asked for it."""
    if column not in table.columns:
        there = ", ".join(table.columns)
        raise DataError(f"{table.where}: {named_by} names column {column!r}; there are: {there}")


def text_of(table: Table, number: int, row: Mapping[str, Any], column: str) -> str:
    """Returns a cell as text. Numbers and truth values are spelt as Python does: a JSON true is `True`."""
    value = row[column]
    where = f"{table.at(number)}, column {column!r}"
    if is_missing(value):
        raise DataError(f"{where}: missing or empty; fill it in or remove the row")
    if not isinstance(value, (str, int, float)):
        raise DataError(
            f"{where}: holds a {type(value).__name__}; only text and numbers can be used"
        )
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: holds half of a surrogate pair; write the character") from None
    return text


def is_missing(value: Any) -> bool:
    """Returns whether there is nothing in a cell. NaN is what pandas and json.dumps write for it; nor is an
    infinite number one that a prompt or a label could be."""
    if isinstance(value, float):
        return not math.isfinite(value)
    return value is None or (isinstance(value, str) and not value.strip())
