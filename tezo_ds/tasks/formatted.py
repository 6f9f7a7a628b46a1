"""Examples of a table whose columns are a known format: texts, completions, conversations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tezo_ds.errors import DataError
from tezo_ds.tasks.builtin import BUILTIN_TASKS
from tezo_ds.tasks.cells import check_column, is_missing, text_of
from tezo_ds.tasks.example import Example, Maker
from tezo_ds.tasks.formats import (
    KNOWN,
    Conversation,
    Format,
    Kind,
    format_of,
    is_conversation,
    messages_of,
    with_context,
)
from tezo_ds.tasks.spec import TaskSpec
from tezo_ds.tasks.table import Table

LABEL = "label"  # column that a text without a template has for nothing


def asked_format(
    task: str, table: Table, template: str | None, fields: Mapping[str, str | None],
    alone: bool = False,
) -> Format | None:  # fmt: skip
    """Returns the format of a file's rows; None of a task with a template, which needs none.

    Args:
        task, table, template: of the file.
        fields: names of columns that the user gave.
        alone: whether prompts need no completions.

    Raises:
        DataError: the columns are no format that is known, or names of columns do not go together.
    """
    given = {f"{name}_field": column for name, column in fields.items() if column is not None}
    whole = {"text_field", "messages_field"} & given.keys()
    if task in BUILTIN_TASKS and given:
        raise DataError(
            f"{task}: {', '.join(given)}: are for files; a built-in task has its own columns"
        )
    if whole and len(given) > 1:
        raise DataError(
            f"{task}: {' and '.join(given)} do not go together; {min(whole)} stands alone"
        )
    if template is not None and given.keys() - {"completion_field"}:
        raise DataError(
            f"{task}: template and {', '.join(given)} both say what a prompt is; keep one"
        )
    if task in BUILTIN_TASKS or (template is not None and not given):
        return None
    form = format_of(table.columns, **fields)
    if form is not None and form.kind is Kind.TEXT and LABEL in table.columns and not given:
        raise DataError(
            f"{table.where}: has columns 'text' and {LABEL!r}; give a template, such as '{{text}} It was', "
            "or text_field text to train on the texts alone"
        )
    if alone and fields.get("completion") is None:
        form = _of_prompts(form, table)
    if form is None:
        there = ", ".join(table.columns)
        raise DataError(
            f"{table.where}: columns {there} are none of the formats that are known ({KNOWN}); give a "
            "template, such as '{text} It was', or name columns by text_field, prompt_field and "
            "completion_field, or messages_field"
        )
    return form


def _of_prompts(form: Format | None, table: Table) -> Format | None:
    """Returns the format of prompts alone, where that is what the columns are; else `form`."""
    column = "prompt" if form is None else form.columns[0]
    known = form is not None and (
        form.kind is not Kind.COMPLETION or form.columns[1] in table.columns
    )
    if known or column not in table.columns or not len(table.rows):
        return form
    messages = is_conversation(table.rows[0][column])
    return Format(Kind.MESSAGES if messages else Kind.TEXT, (column,))


def formatted(table: Table, spec: TaskSpec, form: Format, everything: bool) -> Maker:
    """Returns what makes the example of a table's row, which names the file, the row and the column where
    something is wrong.

    Args:
        table: the rows.
        spec: whose template is the prompt of completions.
        form: what the columns are.
        everything: whether prompts train, too.

    Raises:
        DataError: a column is missing.
    """
    wanted = form.columns if form.kind is not Kind.COMPLETION else (*spec.columns, form.columns[1])
    for column in wanted:
        check_column(table, column, f"the format ({form.told()})")
    return lambda number, row: _example(table, number, row, spec, form, everything)


def _example(
    table: Table,
    number: int,
    row: Mapping[str, Any],
    spec: TaskSpec,
    form: Format,
    everything: bool,
) -> Example:
    if form.kind is Kind.TEXT:
        return Example(text_of(table, number, row, form.columns[0]), None, None, Kind.TEXT)
    if form.kind is Kind.MESSAGES:
        messages = _messages(table, number, row, form.columns[0])
        return _conversation(Conversation(messages, None, _tools(table, number, row)), everything)
    first, second = form.columns
    if spec.columns == [first] and is_conversation(row[first]):
        asked, told = (_messages(table, number, row, column) for column in (first, second))
        conversation = Conversation([*asked, *told], len(asked), _tools(table, number, row))
        return _conversation(conversation, everything)
    values = {column: text_of(table, number, row, column) for column in spec.columns}
    prompt = spec.fill(values)
    if form.context is not None:
        missing = is_missing(row[form.context])
        prompt = with_context(prompt, "" if missing else text_of(table, number, row, form.context))
    answer = text_of(table, number, row, second)
    return Example(prompt, None, answer, Kind.COMPLETION, everything)


def _conversation(conversation: Conversation, everything: bool) -> Example:
    return Example(conversation.to_text(), None, None, Kind.MESSAGES, everything)


def _messages(
    table: Table, number: int, row: Mapping[str, Any], column: str
) -> list[dict[str, Any]]:
    return messages_of(row[column], f"{table.at(number)}, column {column!r}")


def _tools(table: Table, number: int, row: Mapping[str, Any]) -> list[Any] | None:
    """Returns the functions that a row's template shows: a list, or its JSON, as Parquet files have it."""
    found = row.get("tools")
    if is_missing(found) or found == []:
        return None
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except json.JSONDecodeError:
            found = None
    if not isinstance(found, list):
        raise DataError(f"{table.at(number)}, column 'tools': is no list of functions")
    return found
