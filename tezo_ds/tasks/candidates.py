"""Examples with answers of their own to choose from, as in COPA and ReCoRD."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tezo_ds.errors import DataError
from tezo_ds.tasks.cells import text_of
from tezo_ds.tasks.example import Example
from tezo_ds.tasks.spec import TaskSpec
from tezo_ds.tasks.table import Table


def with_candidates(
    table: Table, number: int, row: Mapping[str, Any], spec: TaskSpec, prompt: str
) -> Example:
    """Returns the example of one row, whose answers are a list in one column.

    Args:
        table, number, row: the row, and where it is.
        spec: names the columns of the answers and of the right one: itself, or its index from 0.
        prompt: the template, filled.

    Raises:
        DataError: there are fewer than two answers, two are alike, or the right one is not among them.
    """
    assert spec.choices_field is not None
    where = f"{table.at(number)}, column {spec.choices_field!r}"
    answers = _answers(row[spec.choices_field], where)
    right = text_of(table, number, row, spec.label_field).strip()
    if right not in answers:
        index = right[:-2] if right.endswith(".0") else right  # pandas' floats
        if not index.isdecimal() or int(index) >= len(answers):
            raise DataError(
                f"{table.at(number)}, column {spec.label_field!r}: {right!r} is none of the {len(answers)} "
                f"answers in column {spec.choices_field!r}, nor the index of one, from 0"
            )
        right = answers[int(index)]
    return Example(prompt, None, right, candidates=tuple(answers))


def _answers(cell: Any, where: str) -> list[str]:
    if isinstance(cell, str):  # of CSV files
        try:
            cell = json.loads(cell)
        except json.JSONDecodeError:
            cell = None
    if not isinstance(cell, Sequence) or isinstance(cell, str) or len(cell) < 2:
        raise DataError(f"{where}: is no list of two answers or more")
    answers = [str(answer).strip() for answer in cell]
    for answer in answers:
        if not answer:
            raise DataError(f"{where}: has an empty answer; fill it in or remove the row")
        if answers.count(answer) > 1:
            raise DataError(f"{where}: has the answer {answer[:40]!r} twice; remove one of them")
    return answers
