"""Files read into the memory-mapped Arrow files that `datasets` caches, for `--streaming`.

Lines of JSON stay texts there, and cells of CSV, too: pyarrow and pandas would guess types, and make
dates of texts like 2024-05-01. So rows are to the letter those of `reading.read_file`.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value

from tezo_ds.errors import DataError, one_line
from tezo_ds.tasks.arrow import quiet_datasets, table_of
from tezo_ds.tasks.csv_rows import Head, head_of
from tezo_ds.tasks.mapped import MappedRows, raw_rows
from tezo_ds.tasks.reading import FIRST, checked_suffix, first_text, json_row, refuse_not_utf8
from tezo_ds.tasks.table import Table

BOM = "\ufeff"  # which stays before the first line of a compressed file


def mapped_file(path: Path) -> Table:
    """Reads a file as `reading.read_file` does, its rows left on disk.

    Raises:
        DataError: names the file, and the row where it is one.
    """
    suffix = checked_suffix(path)
    if suffix == ".parquet":
        if path.suffix != suffix:
            raise DataError(f"{path}: is a packed Parquet file; unpack it, or leave streaming out")
        return table_of(str(path), _cached(path, Dataset.from_parquet), mapped=True)
    start = first_text(path)
    if not start.strip():
        raise DataError(f"{path}: the file is empty")
    if suffix in (".csv", ".tsv"):
        return _csv(path, head_of(str(path), start, "\t" if suffix == ".tsv" else None))
    if start.lstrip().startswith("["):
        raise DataError(
            f"{path}: is one JSON array, which is read as a whole; write it as lines (.jsonl), or leave "
            "streaming out"
        )
    return _json_lines(path)


def _cached(path: Path, read: Any, **options: Any) -> Dataset:
    """Reads a file through `datasets`, whose cache holds its rows; of ranks on a node one writes it."""
    with quiet_datasets():
        try:
            found: Dataset = read(str(path), **options)
            return found
        except Exception as error:  # pyarrow's, pandas', and the library's around them
            refuse_not_utf8(path, error)
            if "corresponds to no data" in str(error):  # what `datasets` says of no rows
                raise DataError(f"{path}: the file has no rows") from None
            cause = error.__cause__ or error
            raise DataError(f"{path}: cannot be read ({one_line(cause)})") from None


def _json_lines(path: Path) -> Table:
    """Returns a table of the JSON objects in a file's lines; looks at all of them once."""
    lines = _cached(path, Dataset.from_text, encoding="utf-8-sig", chunksize=FIRST).with_format(
        "arrow"
    )
    columns: dict[str, None] = {}
    kept, whole = array("q"), True
    for index, line in enumerate(raw_rows(lines)):
        if (text := line["text"].removeprefix(BOM)).strip():
            columns.update(dict.fromkeys(json_row(path, index + 1, text)))
            kept.append(index)
        else:
            whole = False
    names = list(columns)

    def decode(line: Mapping[str, Any]) -> dict[str, Any]:
        found = json_row(path, 0, line["text"].removeprefix(BOM))
        return {name: found.get(name) for name in names}

    numbers = None if whole else np.frombuffer(kept, dtype=np.int64)
    return Table(str(path), names, MappedRows(lines, decode, numbers))


def _csv(path: Path, head: Head) -> Table:
    """Returns a table of a CSV file's rows as texts; a cell that a short row lacks is empty."""
    names = [name or f"unnamed {i}" for i, name in enumerate(head.header)]
    dataset = _cached(
        path, Dataset.from_csv, features=Features({name: Value("string") for name in names}),
        names=names, header=0, sep=head.delimiter, skiprows=head.skipped,
        keep_default_na=False, na_filter=False, encoding="utf-8-sig",
    )  # fmt: skip
    columns = [name for name in head.header if name]

    def decode(row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: row[name] or "" for name in columns}

    return Table(str(path), columns, MappedRows(dataset, decode))
