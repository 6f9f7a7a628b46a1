"""Splits and samples of examples: functions of prompts and seeds, not of the order of rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from tezo_ds.errors import DataError
from tezo_ds.tasks.example import Example
from tezo_ds.tasks.table import Table


def deduplicate(examples: list[Example]) -> list[Example]:
    """Returns the first example of each key."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.key, example)
    return list(first.values())


def _rank(example: Example, purpose: str, seed: int) -> float:
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


@dataclass(frozen=True)
class Parts:
    """Examples of a task in parts that share no prompt.

    Attributes:
        train, test, validation: the parts.
        leaked: how many were left out of training, or of a validation file, for their prompts.
    """

    train: list[Example]
    test: list[Example]
    validation: list[Example]
    leaked: int = 0


def with_validation(
    train: list[Example], test: list[Example], given: list[Example] | None, where: str,
    count: int | None, seed: int,
) -> Parts:  # fmt: skip
    """Returns parts with examples for validation, which share no prompt with the test's, nor the training
    examples with theirs.

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
        return Parts(train, test, [])
    held = {e.prompt for e in validation}
    kept = [e for e in train if e.prompt not in held]
    if not kept:
        raise DataError(
            f"{where}: {len(validation)} validation examples leave none of {len(train)} to train on; take "
            "fewer (validation_examples)"
        )
    repeated = len(train) - len(kept) - (0 if given is not None else len(validation))
    return Parts(kept, test, validation, left + repeated)


def hold_out(
    examples: list[Example], fraction: float, seed: int, where: str
) -> tuple[list[Example], list[Example]]:
    train = [e for e in examples if _rank(e, "split", seed) >= fraction]
    test = [e for e in examples if _rank(e, "split", seed) < fraction]
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
        chosen |= {e.key for e in sorted(of_it, key=lambda e: _rank(e, "shots", seed))[:shots]}
    return [e for e in examples if e.key in chosen]


def subset(
    examples: list[Example], count: int | None, seed: int, purpose: str = "subset"
) -> list[Example]:
    """Returns `count` examples, or all if there are fewer, in their given order."""
    if count is None or count >= len(examples):
        return examples
    chosen = sorted(examples, key=lambda e: _rank(e, purpose, seed))[:count]
    keys = {e.key for e in chosen}
    return [e for e in examples if e.key in keys]
