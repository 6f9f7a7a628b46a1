"""Rows out of files and off the hub as plain Python values; the hub's through `datasets`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tezo_ds.errors import DataError
from tezo_ds.tasks.csv_rows import read_csv
from tezo_ds.tasks.spec import TaskSpec

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".csv")


@dataclass(frozen=True)
class Table:
    """The rows of one split; `where` names the split in error messages."""

    where: str
    columns: Sequence[str]
    rows: Sequence[Mapping[str, Any]]


def one_line(error: BaseException) -> str:
    """Returns the first line of an error's innermost cause: `datasets` wraps the one that says something."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def find_splits(data: str) -> tuple[Path, Path | None]:
    """Returns (training file, test file or None) of a folder with train.* and test.*, or of one file."""
    path = Path(data)
    if not os.path.exists(path):  # which, other than Path.exists, takes names that are too long
        raise DataError(f"{path}: no such file or folder")
    if not path.is_dir():
        return path, None
    train, test = _split_file(path, "train"), _split_file(path, "test")
    if train is None:
        raise DataError(f"{path}: no train.jsonl, train.json or train.csv in this folder")
    return train, test


def _split_file(folder: Path, split: str) -> Path | None:
    found = [folder / f"{split}{s}" for s in SUFFIXES if (folder / f"{split}{s}").exists()]
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise DataError(f"{folder}: {names} are all there; keep one of them")
    return found[0] if found else None


def read_file(path: Path) -> Table:
    """Reads a .jsonl, .json or .csv file, without network. Raises DataError."""
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: not a {', '.join(SUFFIXES)} file")
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file")
    text = _read_text(path)
    if text.strip() in ("", "[]"):
        raise DataError(f"{path}: the file is empty")
    if path.suffix == ".csv":
        return Table(str(path), *read_csv(str(path), text))
    return _read_json(path, text)


def _read_text(path: Path) -> str:
    raw = b""
    try:
        raw = path.read_bytes()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


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


def read_hub(spec: TaskSpec, split: str) -> Table:
    """Reads one split of a built-in task from the hub (or its cache). Raises DataError."""
    import datasets

    where = f"{spec.hub_id} ({split})"
    with _quiet_datasets():
        try:
            # The hub's cache is shared by all ranks: datasets locks it, and one of them downloads.
            dataset = datasets.load_dataset(
                spec.hub_id, spec.hub_config, split=split, revision=spec.hub_revision
            )
        except Exception as error:  # network, offline mode, gone, gated: no common base
            raise DataError(
                f"cannot reach {spec.hub_id} on the Hugging Face hub ({one_line(error)}); "
                "pass --data FOLDER, a folder with train.jsonl and test.jsonl"
            ) from error
        if spec.hub_label_field is not None and spec.label_field not in dataset.column_names:
            dataset = dataset.rename_column(spec.hub_label_field, spec.label_field)
        return _table(where, dataset)


def _table(where: str, dataset: Dataset) -> Table:
    """Returns a dataset's rows in memory, class numbers turned to class names (-1, unlabelled, to None)."""
    from datasets import ClassLabel

    rows = dataset.to_list()
    for column, feature in dataset.features.items():
        if isinstance(feature, ClassLabel):
            for row in rows:
                number = row[column]
                unlabelled = number is None or number < 0
                row[column] = None if unlabelled else feature.int2str(number)
    return Table(where, list(dataset.column_names), rows)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Context manager: no progress bars of `datasets` inside (one set a rank), nor logs beside our errors."""
    import datasets

    had_bars = not datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()
