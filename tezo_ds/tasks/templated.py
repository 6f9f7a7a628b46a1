"""Examples by a template and labels: what the spec is, and what it makes of a row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tezo_ds.errors import DataError
from tezo_ds.tasks.builtin import BUILTIN_TASKS
from tezo_ds.tasks.candidates import with_candidates
from tezo_ds.tasks.cells import check_column, is_missing, text_of
from tezo_ds.tasks.example import Example, Maker
from tezo_ds.tasks.spec import TaskSpec
from tezo_ds.tasks.table import Table


def resolve_spec(
    task: str,
    tables: list[Table],
    template: str | None,
    verbalizers: Mapping[Any, str] | None,
    label_field: str | None,
    choices_field: str | None,
    most: int | None = None,
) -> TaskSpec:
    """Returns a task's spec: the built-in's, or a file's, with what was given in place of its own.

    Raises:
        DataError: a field is malformed, or there are above `most` labels that are words themselves.
    """
    builtin = BUILTIN_TASKS.get(task)
    fields: dict[str, Any] = builtin.model_dump() if builtin else {"name": Path(task).stem}
    given = {"template": template, "label_field": label_field, "choices_field": choices_field}
    fields |= {name: value for name, value in given.items() if value is not None}
    if verbalizers is not None:
        if any(isinstance(label, float) and is_missing(label) for label in verbalizers):
            raise DataError(f"{task}: verbalizers: a label is missing (NaN); leave it out")
        fields["verbalizers"] = {str(label): word for label, word in verbalizers.items()}
    spec = spec_of(task, fields)
    if builtin is None and verbalizers is None and choices_field is None:
        words = _labels_as_words(tables, spec, label_field is not None, most)
        spec = spec_of(task, {**fields, "verbalizers": words})
    return spec


def spec_of(task: str, fields: Mapping[str, Any]) -> TaskSpec:
    """Makes a spec; raises DataError, in one line, where a field is malformed."""
    try:
        return TaskSpec(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "task"
        message = first["msg"].removeprefix("Value error, ")
        raise DataError(f"{task}: {field}: {message}") from None


def _labels_as_words(
    tables: list[Table], spec: TaskSpec, required: bool, most: int | None
) -> dict[str, str] | None:
    """Returns each label as its own word; None where there are no labels to be told apart."""
    column = spec.label_field
    if column not in tables[0].columns:
        if required:
            check_column(tables[0], column, "label_field")
        return None
    if column in spec.columns:
        return None
    labels: set[str] = set()
    for table in tables:
        check_column(table, column, "label_field")
        for number, row in enumerate(table.rows, 1):
            labels.add(text_of(table, number, row, column))
            if most is not None and len(labels) > most:
                raise DataError(
                    f"{table.where}: column {column!r} has above {most} different labels, too many for "
                    "streaming; if they are texts to learn, name it by completion_field instead"
                )
    if len(labels) == 1:
        raise DataError(
            f"{tables[0].where}: all labels in column {column!r} are {labels.pop()!r};"
            " a task needs two"
        )
    # Of 1 and 1.0 the whole number's own spelling stays; `_label_of` finds it for the other.
    return {
        label: label
        for label in sorted(labels)
        if _whole(label) == label or _whole(label) not in labels
    }


def templated(table: Table, spec: TaskSpec) -> Maker:
    """Returns what makes the example of a table's row.

    Raises:
        DataError: a column is missing.
    """
    for column in spec.columns:
        check_column(table, column, "the template")
    if spec.verbalizers is not None or spec.choices_field is not None:
        check_column(table, spec.label_field, "label_field")
    for name in ("choices_field", "answer_field"):
        if (column := getattr(spec, name)) is not None:
            check_column(table, column, name)
    return lambda number, row: _example(table, number, row, spec)


def _example(table: Table, number: int, row: Mapping[str, Any], spec: TaskSpec) -> Example:
    values = {column: text_of(table, number, row, column) for column in spec.columns}
    if (spec.verbalizers, spec.choices_field, spec.answer_field) == (None, None, None):
        return Example(spec.fill(values), None, None)
    # Stripped, because some sets end each sentence in a space, and the template adds its own.
    prompt = spec.fill({column: value.strip() for column, value in values.items()})
    if spec.choices_field is not None:
        return with_candidates(table, number, row, spec, prompt)
    if spec.answer_field is not None:
        return Example(prompt, None, text_of(table, number, row, spec.answer_field).strip())
    assert spec.verbalizers is not None
    text = text_of(table, number, row, spec.label_field)
    label = _label_of(text, spec.verbalizers)
    if label is None:
        known = ", ".join(spec.verbalizers)
        raise DataError(f"{table.at(number)}: label {text!r} has no word; known: {known}")
    return Example(prompt, label, spec.verbalizers[label])


def _label_of(text: str, known: Mapping[str, str]) -> str | None:
    """Returns the label that a cell spells. A column of integers with a gap in it is one of floats to
    pandas, and so 1.0 stands for 1, but where both are labels."""
    if text in known:
        return text
    same = [label for label in known if _whole(label) == _whole(text)]
    return same[0] if len(same) == 1 else None


def _whole(text: str) -> str:
    """Returns a whole number without the `.0` of a float; any other text as it is."""
    return text[:-2] if text.endswith(".0") and text[:-2].lstrip("-").isdecimal() else text
