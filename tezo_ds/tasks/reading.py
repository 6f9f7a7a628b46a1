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
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def format_suffix(path: Path) -> str:
    """Returns the suffix that says what is in a file, without that of its compression."""
    name = path.name.removesuffix(path.suffix) if path.suffix in OPENERS else path.name
    return Path(name).suffix


def read_file(path: Path) -> Table:
    """Reads a .jsonl, .json, .csv, .tsv or .parquet file, or one of these compressed by gzip, bzip2 or xz,
    without network. Raises DataError."""
    suffix = format_suffix(path)
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path}: not a {', '.join(SUFFIXES)} file, nor one of these with {', '.join(OPENERS)}"
        )
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file")
    if suffix == ".parquet":
        return _read_parquet(path)
    text = _read_text(path)
    if text.strip() in ("", "[]"):
        raise DataError(f"{path}: the file is empty")
    if suffix in (".csv", ".tsv"):
        return Table(str(path), *read_csv(str(path), text, "\t" if suffix == ".tsv" else None))
    return _read_json(path, text)


def _read_bytes(path: Path) -> bytes:
    try:
        with OPENERS.get(path.suffix, open)(path, "rb") as file:
            return bytes(file.read())
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
    rows: list[Any] = []
    for number, piece in enumerate([text] if whole else text.split("\n"), 1):
        if not piece.strip():
            continue
        try:
            found = json.loads(piece)
        except json.JSONDecodeError as error:
            line = number + error.lineno - 1 if whole else number
            raise DataError(f"{path}, line {line}: not valid JSON: {error.msg}") from None
        except (ValueError, RecursionError):
            raise DataError(
                f"{path}, line {number}: a number has too many digits, or lists are nested too deep"
            ) from None
        if not whole and not isinstance(found, dict):
            raise DataError(f"{path}, line {number}: not a JSON object")
        rows += found if whole else [found]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: not a JSON object")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return Table(str(path), columns, [{c: row.get(c) for c in columns} for row in rows])
