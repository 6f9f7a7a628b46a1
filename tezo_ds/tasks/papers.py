"""Rows of published data sets whose columns a template cannot take as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tezo_ds.errors import DataError, one_line
from tezo_ds.tasks.table import Table

Row = Mapping[str, Any]


def _copa(row: Row) -> Row:
    """Premise and connective; alternatives in lower case, to follow it."""
    connective = {"cause": "because", "effect": "so"}[row["question"]]
    choices = [row[name][:1].lower() + row[name][1:] for name in ("choice1", "choice2")]
    right = row["label"]
    index = {"choice1": 0, "choice2": 1}.get(right, right)
    answer = None if index is None else choices[int(index)]
    return {
        "start": f"{row['premise'].rstrip(' .')} {connective}",
        "choices": choices,
        "label": answer,
    }


def _record(row: Row) -> Row | None:
    """Passage, and the query with each entity in the place that is left open."""
    entities = list(dict.fromkeys(row["entities"]))
    if not row["answers"] or len(entities) < 2:
        return None
    filled = [row["query"].replace("@placeholder", entity) for entity in entities]
    right = row["query"].replace("@placeholder", row["answers"][0])
    passage = row["passage"].replace("@highlight\n", "- ")
    return {"passage": passage, "choices": filled, "label": right}


def _squad(row: Row) -> Row | None:
    texts = row["answers"]["text"]
    return {**row, "answer": texts[0]} if texts else None


def _drop(row: Row) -> Row | None:
    spans = row["answers_spans"]["spans"]
    return {**row, "answer": spans[0]} if spans else None


def _labelled(row: Row) -> Row | None:
    """Leaves out what annotators did not agree on."""
    return row if row["label"] not in (None, -1) else None


# By task a column by which rows are known as published, as those with a template's columns already stay as
# they are, and what makes of such a row one with these columns; None leaves it out.
PREPARE: dict[str, tuple[str, Callable[[Row], Row | None]]] = {
    "copa": ("premise", _copa), "record": ("query", _record), "squad": ("answers", _squad),
    "drop": ("answers_spans", _drop), "snli": ("label", _labelled),
}  # fmt: skip


def prepared(task: str, table: Table) -> Table:
    """Returns a built-in task's table with the columns that its template takes; rows without an answer are
    left out.

    Raises:
        DataError: a row is not as the data set has them.
    """
    if task not in PREPARE:
        return table
    column, prepare = PREPARE[task]
    if column not in table.columns:
        return table
    if not isinstance(table.rows, list):
        raise DataError(
            f"{table.where}: rows of {task} are changed as they are read; leave streaming out"
        )
    rows = []
    for number, row in enumerate(table.rows, 1):
        try:
            found = prepare(row)
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            raise DataError(
                f"{table.at(number)}: is no row of {task} ({one_line(error)})"
            ) from None
        rows += [] if found is None else [found]
    return Table(table.where, list(rows[0]) if rows else list(table.columns), rows)
