"""Rows through the library `datasets`: off the hub, out of `save_to_disk`'s folders and Parquet files."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetDict

from tezo_ds.errors import DataError, one_line
from tezo_ds.tasks.mapped import MappedRows
from tezo_ds.tasks.table import Table

INSTEAD = "pass a file, or a folder with train.jsonl"  # of a hub that cannot be reached


def table_of_parquet(path: Path, content: bytes) -> Table:
    """Reads the content of a Parquet file, whose classes have the names that `datasets` wrote into it.

    Raises:
        DataError: it is none.
    """
    try:
        dataset = Dataset(pyarrow.parquet.read_table(io.BytesIO(content)))
        return table_of(str(path), dataset)
    except Exception as error:  # pyarrow's have no common base
        raise DataError(f"{path}: not a Parquet file ({one_line(error)})") from None


def saved_splits(folder: Path, mapped: bool = False) -> dict[str, Table]:
    """Reads a folder that `save_to_disk` wrote, by the names of its splits; "train" of a single one.
    `mapped`: rows stay on disk.

    Raises:
        DataError: it cannot be read.
    """
    with quiet_datasets():
        try:
            found: Any = datasets.load_from_disk(str(folder))
            splits = dict(found) if isinstance(found, DatasetDict) else {"train": found}
            return {
                str(name): table_of(f"{folder} ({name})", split, mapped)
                for name, split in splits.items()
            }
        except Exception as error:  # of files, of arrow, of JSON: no common base
            raise DataError(f"{folder}: cannot be read ({one_line(error)})") from None


def read_hub(
    hub_id: str, config: str | None, split: str, revision: str | None,
    renamed: tuple[str, str] | None = None, instead: str = INSTEAD, mapped: bool = False,
) -> Table:  # fmt: skip
    """Reads one split of a data set of the hub (or its cache).

    Args:
        hub_id, config, split, revision: as `datasets.load_dataset` takes them.
        renamed: a column's name there, and the one that it gets where there is none of that name yet.
        instead: what to do without the hub, for the error.
        mapped: whether rows stay in the hub's cache on disk.

    Raises:
        DataError: it cannot be had.
    """
    with _asking_hub(hub_id, instead):
        # The hub's cache is shared by all ranks: datasets locks it, and one of them downloads.
        dataset: Any = datasets.load_dataset(hub_id, config, split=split, revision=revision)
    with quiet_datasets():
        if renamed is not None and renamed[1] not in dataset.column_names:
            dataset = dataset.rename_column(*renamed)
        return table_of(f"{hub_id} ({split})", dataset, mapped)


def hub_splits(hub_id: str, config: str | None, revision: str | None) -> list[str]:
    """Returns the names of a hub data set's splits.

    Raises:
        DataError: they cannot be had.
    """
    with _asking_hub(hub_id, INSTEAD):
        return list(datasets.get_dataset_split_names(hub_id, config, revision=revision))


@contextmanager
def _asking_hub(hub_id: str, instead: str) -> Iterator[None]:
    """Context manager: what fails inside is that the hub cannot be reached, and `instead` what to do."""
    with quiet_datasets():
        try:
            yield
        except Exception as error:  # network, offline mode, gone, gated: no common base
            raise DataError(
                f"cannot reach {hub_id} on the Hugging Face hub ({one_line(error)}); {instead}"
            ) from error


def table_of(where: str, dataset: Dataset, mapped: bool = False) -> Table:
    """Returns a dataset's rows, in memory or `mapped`, class numbers turned to class names (-1, unlabelled,
    to None)."""
    classes = {
        column: feature
        for column, feature in dataset.features.items()
        if isinstance(feature, ClassLabel)
    }

    def named(row: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(row)
        for column, feature in classes.items():
            number = found[column]
            unlabelled = number is None or number < 0
            found[column] = None if unlabelled else feature.int2str(number)
        return found

    columns = list(dataset.column_names)
    if mapped:
        return Table(where, columns, MappedRows(dataset, named))
    return Table(where, columns, [named(row) for row in dataset.to_list()])


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Context manager: no progress bars of `datasets` inside (one set a rank), nor logs beside our errors."""
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
