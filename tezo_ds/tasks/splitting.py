"""Splits and samples of examples: functions of prompts and seeds, not of the order of rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from tezo_ds.errors import DataError
from tezo_ds.tasks.example import Example, Maker
from tezo_ds.tasks.table import Table

Source = tuple[Table, Maker]  # rows, and what makes an example of one


@dataclass(frozen=True)
class Asked:
    """How much of a table goes into which part, and by which seed; see `data.load_task`."""

    test_fraction: float
    train_examples: int | None = None
    test_examples: int | None = None
    validation_examples: int | None = None
    shots: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Parts:
    """Examples of a task in parts that share no prompt.

    Attributes:
        train, test, validation: the parts.
        duplicates: rows left out because their key was in an earlier one.
        leaked: how many were left out of training, or of a validation file, for their prompts.
    """

    train: Sequence[Example]
    test: list[Example]
    validation: list[Example]
    duplicates: int
    leaked: int


def split(train: Source, test: Source | None, validation: Source | None, asked: Asked) -> Parts:
    """Returns the parts of a task.

    Args:
        train: rows, and what makes an example of one.
        test: those of the test; None: a fraction of the first is held out.
        validation: those to validate on; None: those that `asked` holds out of the training examples.
        asked: how much of each to take.

    Raises:
        DataError: a row is wrong, or nothing is left for a part.
    """
    given = [each for each in (train, test, validation) if each is not None]
    made = [[make(i, row) for i, row in enumerate(table.rows, 1)] for table, make in given]
    unique = [deduplicate(examples) for examples in made]
    duplicates = sum(map(len, made)) - sum(map(len, unique))
    apart, seed, where = None if validation is None else unique.pop(), asked.seed, train[0].where
    if test is not None:
        found, tested = unique
        kept = remove_prompts(found, tested, [train[0], test[0]])
    else:
        found, tested = hold_out(unique[0], asked.test_fraction, seed, where)
        kept = found
    leaked, of = len(found) - len(kept), where if validation is None else validation[0].where
    kept, judged, more = with_validation(kept, tested, apart, of, asked.validation_examples, seed)
    if asked.shots is not None:
        kept = so_many_of_each(kept, asked.shots, seed, where)
    kept, tested = (
        subset(kept, asked.train_examples, seed), subset(tested, asked.test_examples, seed)
    )  # fmt: skip
    return Parts(kept, tested, judged, duplicates, leaked + more)


def deduplicate(examples: list[Example]) -> list[Example]:
    """Returns the first example of each key."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.key, example)
    return list(first.values())


def rank_of(example: Example, purpose: str, seed: int) -> float:
    """Returns a number in [0, 1) that depends on purpose, seed and prompt alone."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{example.prompt}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def remove_prompts(train: list[Example], test: list[Example], tables: list[Table]) -> list[Example]:
    """Returns the training examples whose prompt is not in the test file."""
    held_out = {e.prompt for e in test}
    kept = [e for e in train if e.prompt not in held_out]
    if not kept:
        raise DataError(f"{tables[0].where}: every prompt is also in {tables[1].where}")
    return kept


def with_validation(
    train: list[Example], test: list[Example], given: list[Example] | None, where: str,
    count: int | None, seed: int,
) -> tuple[list[Example], list[Example], int]:  # fmt: skip
    """Returns training and validation examples, of which the latter share no prompt with the test's, nor the
    former with theirs, and how many were left out for that.

    Args:
        train, test: parts that share no prompt.
        given: examples of a validation file; None: those are held out of the training examples.
        where: names what `given`, or else `train` are of, for errors.
        count: the most to take of a file, or how many to hold out; None: all of a file, or none.
        seed: of the choice.

    Raises:
        DataError: nothing is left to train or to validate on.
    """
    tested, left = {e.prompt for e in test}, 0
    if given is not None:
        fresh = [e for e in given if e.prompt not in tested]
        validation, left = subset(fresh, count, seed, "validation"), len(given) - len(fresh)
        if not validation:
            raise DataError(f"{where}: every prompt is also in the test examples")
    elif count is not None:
        validation = subset(train, count, seed, "validation")
    else:
        return train, [], 0
    held = {e.prompt for e in validation}
    kept = [e for e in train if e.prompt not in held]
    if not kept:
        raise DataError(
            f"{where}: {len(validation)} validation examples leave none of {len(train)} to train on; take "
            "fewer (validation_examples)"
        )
    repeated = len(train) - len(kept) - (0 if given is not None else len(validation))
    return kept, validation, left + repeated


def hold_out(
    examples: list[Example], fraction: float, seed: int, where: str
) -> tuple[list[Example], list[Example]]:
    train = [e for e in examples if rank_of(e, "split", seed) >= fraction]
    test = [e for e in examples if rank_of(e, "split", seed) < fraction]
    if not train or (fraction > 0 and not test):
        raise DataError(
            f"{where}: {len(examples)} prompts split into {len(train)} for training and {len(test)}"
            f" for test; change test_fraction ({fraction}) or pass test_data"
        )
    return train, test


def so_many_of_each(examples: list[Example], shots: int, seed: int, where: str) -> list[Example]:
    """Returns so many examples of each label, in their given order.

    Raises:
        DataError: a label has fewer, or there are no labels.
    """
    labels = sorted({str(e.label) for e in examples if e.label is not None})
    if not labels:
        raise DataError(
            f"{where}: shots are examples of a label, and there are none; use train_examples"
        )
    chosen: set[str] = set()
    for label in labels:
        of_it = [e for e in examples if e.label == label]
        if len(of_it) < shots:
            raise DataError(
                f"{where}: label {label!r} has {len(of_it)} training examples, and shots asks for {shots}"
            )
        chosen |= {e.key for e in sorted(of_it, key=lambda e: rank_of(e, "shots", seed))[:shots]}
    return [e for e in examples if e.key in chosen]


def subset(
    examples: list[Example], count: int | None, seed: int, purpose: str = "subset"
) -> list[Example]:
    """Returns `count` examples, or all if there are fewer, in their given order."""
    if count is None or count >= len(examples):
        return examples
    chosen = sorted(examples, key=lambda e: rank_of(e, purpose, seed))[:count]
    keys = {e.key for e in chosen}
    return [e for e in examples if e.key in keys]
