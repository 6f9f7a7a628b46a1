"""Rows of a CSV file as texts, as spreadsheets and pandas write them; what is wrong is said with its line."""

from __future__ import annotations

import csv
import io
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tezo_ds.errors import DataError

Line = tuple[int, list[str]]
Row = dict[str, str]

_NAMED = re.compile(r'"?sep=([^\w"\r\n])"?\r?\n', re.IGNORECASE)  # Excel's first line
_END = "end"
_LIMIT = threading.Lock()  # of csv's bound on a field, which all threads share


def read_csv(where: str, text: str, delimiter: str | None = None) -> tuple[list[str], list[Row]]:
    """Returns the names of the columns and the rows; a cell that a short row lacks is empty.

    Unless it is given the delimiter is a comma, or the semicolon or tab that parts a header without
    commas, or what a first line `sep=;` says. A column without a name is left out if it is the first, which
    is where pandas puts its index, or empty, which is what trailing commas leave. Cells stay text: pandas
    would make the label `01` 1 and the word `NA` null.

    Raises:
        DataError: one line, of the first thing that is wrong.
    """
    body, before, delimiter = _begun(where, text, delimiter)
    (first, header), *lines = [(n + before, row) for n, row in _lines(where, body, delimiter)]
    if not lines:
        raise DataError(f"{where}: the file has a header and no rows")
    header = _names(where, first, header)
    for number, row in lines:
        if len(row) > len(header):
            _check_length(where, number, row, header, delimiter)
    _check_unnamed(where, header, lines, delimiter)
    columns = [(i, name) for i, name in enumerate(header) if name]
    rows = [{name: row[i] if i < len(row) else "" for i, name in columns} for _, row in lines]
    return [name for _, name in columns], rows


@dataclass(frozen=True)
class Head:
    """The beginning of a CSV file.

    Attributes:
        delimiter: what parts its fields.
        header: names of its columns, "" of one that has none.
        skipped: lines before the header.
    """

    delimiter: str
    header: list[str]
    skipped: int


def head_of(where: str, text: str, delimiter: str | None = None) -> Head:
    """Returns what the beginning of a file says of it; see `read_csv`.

    Raises:
        DataError: one line, of what is wrong.
    """
    body, before, delimiter = _begun(where, text, delimiter)
    (first, header), (number, row) = _lines(where, body, delimiter, 2)  # or our own last row
    names = _names(where, first + before, header)
    if len(row) > len(header):
        _check_length(where, number + before, row, header, delimiter)
        raise DataError(f"{where}, line {number + before}: ends in commas that the header has not")
    if any(not name for name in names[1:]):
        raise DataError(f"{where}, line {first + before}: a column has no name; give it one")
    return Head(delimiter, names, first + before - 1)


def _begun(where: str, text: str, delimiter: str | None) -> tuple[str, int, str]:
    """Returns the text from the header on, how many lines are before it, and the delimiter."""
    named = _NAMED.match(text)
    body, before = (text[named.end() :], 1) if named else (text, 0)
    return body, before, delimiter or (named[1] if named else _delimiter(where, body))


def _names(where: str, line: int, header: list[str]) -> list[str]:
    """Returns a header's names, "" of one that is blank. Raises DataError: one is there twice."""
    header = [name if name.strip() else "" for name in header]
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if repeated:
        raise DataError(f"{where}, line {line}: column {repeated[0]!r} is there twice; rename one")
    return header


def _lines(where: str, text: str, delimiter: str, most: int | None = None) -> list[Line]:
    """Returns (number of its first line, fields) of each row that is not blank, of the first `most` rows."""
    found: list[Line] = []
    # A last row of our own, which a quote that is never closed would swallow.
    reader = csv.reader(io.StringIO(f"{text}\n{_END}", newline=""), delimiter=delimiter)
    with _long_fields(len(text) + len(_END) + 1):
        try:
            before = 0
            for row in reader:
                if row and (len(row) > 1 or not row[0] or row[0].strip(" \t")):
                    found.append((before + 1, row))
                    if len(found) == most:
                        return found
                before = reader.line_num
        except csv.Error as error:
            raise DataError(f"{where}, line {reader.line_num}: {error}") from None
    number, end = found.pop()
    if end != [_END]:
        raise DataError(
            f"{where}, line {number}: a quote is opened and never closed; close it, or write it twice"
        )
    if not found:
        raise DataError(f"{where}: the file is empty")
    return found


@contextmanager
def _long_fields(length: int) -> Iterator[None]:
    """Context manager: fields may be longer than csv's 131,072 characters."""
    with _LIMIT:
        before = csv.field_size_limit(length)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _delimiter(where: str, text: str) -> str:
    """Returns what parts the header: a comma, unless it has none, and a semicolon or tab parts the first
    row into as many fields."""
    header, *rows = _lines(where, text, ",", 2)
    if len(header[1]) > 1 or not rows:
        return ","
    for other in (";", "\t"):
        lengths = [len(row) for _, row in _lines(where, text, other, 2)]
        if lengths[0] > 1 and lengths[-1] >= lengths[0]:
            return other
    return ","


def _check_length(where: str, number: int, row: list[str], header: list[str], by: str) -> None:
    """Raises DataError if a row has more fields than the header, but for empty ones at its end."""
    if any(cell.strip() for cell in row[len(header) :]):
        raise DataError(
            f"{where}, line {number}: the row has {len(row)} fields, the header {len(header)}; quote fields "
            f"with {_SPOKEN.get(by, repr(by))}"
        )


def _check_unnamed(where: str, header: list[str], lines: list[Line], by: str) -> None:
    """Raises DataError if a column but the first has cells and no name: an unquoted comma shifted them."""
    for i, name in enumerate(header):
        if name or not i:
            continue
        for number, cell in ((n, row[i]) for n, row in lines if row[i : i + 1] and row[i].strip()):
            raise DataError(
                f"{where}, line {number}: field {i + 1} is {cell[:40]!r}, and that column has no name in the "
                f"header; name it, or quote fields with {_SPOKEN.get(by, repr(by))}"
            )


_SPOKEN = {",": "commas", ";": "semicolons", "\t": "tabs"}
