"""Where examples come from: a file, several, a folder, or a data set of the hub."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from tezo_ds.errors import DataError
from tezo_ds.tasks.mapped import joined_mapped
from tezo_ds.tasks.reading import OPENERS, SUFFIXES, format_suffix, read_file
from tezo_ds.tasks.spec import TaskSpec
from tezo_ds.tasks.table import Table, joined

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SAVED = ("dataset_dict.json", "state.json")  # of which `save_to_disk` leaves one in its folder


@dataclass(frozen=True)
class Hub:
    """What to take of a data set that has several configurations, revisions or splits.

    Attributes:
        config, revision: as `datasets.load_dataset` takes them.
        train_split, test_split: names; None of the test split: "test" where there is one.
        validation_split: name of the split to validate on; None: there is none.
    """

    config: str | None = None
    revision: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    validation_split: str | None = None


def is_source(name: str) -> bool:
    """Returns whether a name can be that of data: of a path, of several, or of a data set of the hub."""
    return (
        os.path.exists(name) or glob.has_magic(name) or format_suffix(Path(name)) in SUFFIXES
        or _HUB_ID.fullmatch(name) is not None
    )  # fmt: skip


def read_source(source: str, test_data: str | None, hub: Hub, mapped: bool = False) -> list[Table]:
    """Returns the training table, and the test table if there is one.

    Args:
        source: file, pattern of files, folder with train.* and test.*, folder of `save_to_disk`, or hub id.
        test_data: file or pattern of the test examples, in place of the source's.
        hub: what to take of a data set with several parts.
        mapped: whether rows stay on disk.

    Raises:
        DataError: one line that says what is not there or cannot be read.
    """
    path = Path(source)
    local = os.path.exists(source)  # which, other than Path.exists, takes names that are too long
    if local and path.is_dir() and _is_saved(path):
        tables = _saved(path, hub, mapped)
    elif local and path.is_dir():
        tables = [_read_file(file, mapped) for file in _split_files(path)]
    elif local or glob.has_magic(source):
        tables = [_read_files(source, mapped)]
    elif _HUB_ID.fullmatch(source) and format_suffix(path) not in SUFFIXES:
        tables = _from_hub(source, hub, test_data is None, mapped)
    else:
        raise DataError(f"{source}: no such file or folder")
    return tables if test_data is None else [tables[0], _read_files(test_data, mapped)]


def read_validation(
    source: str | None,
    builtin: TaskSpec | None,
    validation_data: str | None,
    hub: Hub,
    mapped: bool = False,
) -> Table | None:
    """Returns the table to validate on; None where none is asked for.

    Args:
        source: as of `read_source`; None: the built-in task's own on the hub.
        builtin: the task, where it is one.
        validation_data: file or pattern of the validation examples.
        hub: names the split, in place of a file.
        mapped: whether rows stay on disk.

    Raises:
        DataError: it is not there, or both are given.
    """
    name = hub.validation_split
    if validation_data is not None and name is not None:
        raise DataError(
            f"validation_data {validation_data} and validation_split {name} both say what to validate on; "
            "keep one"
        )
    if validation_data is not None:
        return _read_files(validation_data, mapped)
    if name is None:
        return None
    if source is None:
        assert builtin is not None
        return _builtin_split(builtin, name, mapped)
    path = Path(source)
    if os.path.exists(source) and path.is_dir():
        if _is_saved(path):
            return _saved(path, replace(hub, train_split=name, test_split=None), mapped)[0]
        if (file := _split_file(path, name)) is not None:
            return _read_file(file, mapped)
        raise DataError(f"{source}: no {name}.jsonl or the like in this folder to validate on")
    if os.path.exists(source) or glob.has_magic(source):
        raise DataError(
            f"{source}: has no splits, of which validation_split names one ({name}); give validation_data"
        )
    from tezo_ds.tasks.arrow import read_hub

    return read_hub(source, hub.config, name, hub.revision, mapped=mapped)


def _read_files(pattern: str, mapped: bool) -> Table:
    """Reads one file, or all that a pattern matches, in the order of their names."""
    if os.path.exists(pattern) or not glob.has_magic(pattern):
        return _read_file(Path(pattern), mapped)
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise DataError(f"{pattern}: no file matches this pattern")
    tables = [_read_file(Path(path), mapped) for path in found]
    return (joined_mapped if mapped else joined)(pattern, tables)


def _read_file(path: Path, mapped: bool) -> Table:
    if not mapped:
        return read_file(path)
    from tezo_ds.tasks.mapped_files import mapped_file  # imports datasets, which takes a second

    return mapped_file(path)


def _split_files(folder: Path) -> list[Path]:
    """Returns the training file of a folder, and the test file if there is one."""
    train, test = _split_file(folder, "train"), _split_file(folder, "test")
    if train is None:
        raise DataError(f"{folder}: no train.jsonl, train.json or train.csv in this folder")
    return [train] if test is None else [train, test]


def _split_file(folder: Path, split: str) -> Path | None:
    endings = [suffix + more for suffix in SUFFIXES for more in ("", *OPENERS)]
    found = [folder / f"{split}{e}" for e in endings if (folder / f"{split}{e}").exists()]
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise DataError(f"{folder}: {names} are all there; keep one of them")
    return found[0] if found else None


def _is_saved(folder: Path) -> bool:
    return any((folder / name).exists() for name in _SAVED)


def _saved(folder: Path, hub: Hub, mapped: bool) -> list[Table]:
    from tezo_ds.tasks.arrow import saved_splits

    splits = saved_splits(folder, mapped)
    if hub.train_split not in splits or hub.test_split not in (None, *splits):
        raise DataError(
            f"{folder}: has splits {', '.join(splits)}; name those to take by train_split and test_split"
        )
    test = hub.test_split or ("test" if "test" in splits else None)
    return [splits[name] for name in (hub.train_split, test) if name is not None]


def _from_hub(hub_id: str, hub: Hub, wants_test: bool, mapped: bool) -> list[Table]:
    from tezo_ds.tasks.arrow import hub_splits, read_hub

    train = read_hub(hub_id, hub.config, hub.train_split, hub.revision, mapped=mapped)
    test = hub.test_split
    if test is None and wants_test:
        test = "test" if "test" in hub_splits(hub_id, hub.config, hub.revision) else None
    if test is None or not wants_test:
        return [train]
    return [train, read_hub(hub_id, hub.config, test, hub.revision, mapped=mapped)]


def read_builtin(spec: TaskSpec, mapped: bool = False) -> list[Table]:
    """Returns both tables of a built-in task, from the hub; `mapped`: their rows stay on disk."""
    return [_builtin_split(spec, split, mapped) for split in (spec.train_split, spec.test_split)]


def _builtin_split(spec: TaskSpec, split: str, mapped: bool) -> Table:
    from tezo_ds.tasks.arrow import read_hub

    assert spec.hub_id is not None
    field = spec.hub_label_field
    renamed = None if field is None else (field, spec.label_field)
    advice = "pass --data FOLDER, a folder with train.jsonl and test.jsonl"
    revision = spec.hub_revision
    return read_hub(spec.hub_id, spec.hub_config, split, revision, renamed, advice, mapped)
