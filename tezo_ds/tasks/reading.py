"""Rows out of files as plain Python values."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tezo_ds.errors import DataError, one_line
from tezo_ds.tasks.csv_rows import read_csv
from tezo_ds.tasks.table import Table

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
FIRST = 1 << 20  # bytes by which a file is known that is not read as a whole
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def format_suffix(path: Path) -> str:
    """Returns the suffix that says what is in a file, without that of its compression."""
    name = path.name.removesuffix(path.suffix) if path.suffix in OPENERS else path.name
    return Path(name).suffix


def read_file(path: Path) -> Table:
    """Reads a .jsonl, .json, .csv, .tsv or .parquet file, or one of these compressed by gzip, bzip2 or xz,
    without network. Raises DataError."""
    suffix = checked_suffix(path)
    if suffix == ".parquet":
        return _read_parquet(path)
    text = _read_text(path)
    if text.strip() in ("", "[]"):
        raise DataError(f"{path}: the file is empty")
    if suffix in (".csv", ".tsv"):
        return Table(str(path), *read_csv(str(path), text, "\t" if suffix == ".tsv" else None))
    return _read_json(path, text)


def checked_suffix(path: Path) -> str:
    """Returns a file's `format_suffix`. Raises DataError: it is of none that is known, or not there."""
    suffix = format_suffix(path)
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path}: not a {', '.join(SUFFIXES)} file, nor one of these with {', '.join(OPENERS)}"
        )
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file")
    return suffix


def first_text(path: Path) -> str:
    """Returns how a text file begins. Raises DataError: it cannot be read."""
    return _read_bytes(path, FIRST).decode("utf-8-sig", errors="ignore")


def refuse_not_utf8(path: Path, error: BaseException) -> None:
    """Raises DataError, which names the line, if an error or what it comes from is of a file's encoding."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, UnicodeDecodeError):
        found = found.__cause__ or found.__context__
    if found is None:
        return
    with OPENERS.get(path.suffix, open)(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                raise DataError(
                    f"{path}, line {number}: not UTF-8; save the file as UTF-8"
                ) from None


def _read_bytes(path: Path, most: int = -1) -> bytes:
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            return bytes(file.read(most))
    except (OSError, EOFError, lzma.LZMAError) as error:  # gzip's and bz2's own are OSErrors, too
        said = getattr(error, "strerror", None) or one_line(error)
        raise DataError(f"{path}: cannot be read: {said}") from None


def _read_text(path: Path) -> str:
    raw = _read_bytes(path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None


def _read_parquet(path: Path) -> Table:
    from tezo_ds.tasks.arrow import table_of_parquet  # imports datasets, which takes a second

    return table_of_parquet(path, _read_bytes(path))


def _read_json(path: Path, text: str) -> Table:
    """Reads the rows of a JSON array, or of JSON lines. `datasets` would have pyarrow guess types, which
    makes dates of texts like 2024-05-01, and over a line that is `null` ends the process."""
    whole = text.lstrip().startswith("[")
    if not whole:
        pieces = enumerate(text.split("\n"), 1)
        rows = [json_row(path, number, piece) for number, piece in pieces if piece.strip()]
    else:
        rows = _parsed(path, 1, text, whole)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise DataError(f"{path}, row {number}: not a JSON object")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return Table(str(path), columns, [{c: row.get(c) for c in columns} for row in rows])


def json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    """Returns the row in a line of JSON. Raises DataError: it is none; names the line."""
    found = _parsed(path, number, line, whole=False)
    if not isinstance(found, dict):
        raise DataError(f"{path}, line {number}: not a JSON object")
    return found


def _parsed(path: Path, number: int, text: str, whole: bool) -> Any:
    """Parses JSON that begins at a line: the file as a `whole`, or the line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1 if whole else number
        raise DataError(f"{path}, line {line}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError):
        raise DataError(
            f"{path}, line {number}: a number has too many digits, or lists are nested too deep"
        ) from None
