"""Examples of a task: read, checked, deduplicated, split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from tezo_ds.errors import DataError
from tezo_ds.tasks.builtin import BUILTIN_TASKS
from tezo_ds.tasks.candidates import with_candidates
from tezo_ds.tasks.cells import check_column, is_missing, text_of
from tezo_ds.tasks.example import Example
from tezo_ds.tasks.formatted import asked_format, formatted
from tezo_ds.tasks.papers import prepared
from tezo_ds.tasks.reading import SUFFIXES
from tezo_ds.tasks.sources import (
    Hub,
    is_source,
    read_builtin,
    read_source,
    read_validation,
)
from tezo_ds.tasks.spec import TaskSpec
from tezo_ds.tasks.splitting import (
    deduplicate,
    hold_out,
    remove_prompts,
    so_many_of_each,
    subset,
    with_validation,
)
from tezo_ds.tasks.table import Table
from tezo_ds.tasks.unlabelled import unlabelled

NO_HUB = Hub()


@dataclass
class TaskData:
    """The examples of a task, no prompt twice in a split or across two of them."""

    spec: TaskSpec
    train: list[Example]
    test: list[Example]
    duplicates: int = 0
    """Rows left out because their prompt was in an earlier row of the same file."""
    leaked: int = 0
    """Training examples left out because their prompt is in the test or validation file."""
    note: str | None = None
    """What the user should know of how the file was understood."""
    validation: list[Example] = field(default_factory=list)
    """Examples that a run is judged by on its way, where there are any; the test's otherwise are."""


def load_task(
    task: str,
    *,
    data: str | None = None,
    test_data: str | None = None,
    validation_data: str | None = None,
    template: str | None = None,
    verbalizers: Mapping[Any, str] | None = None,
    label_field: str | None = None,
    choices_field: str | None = None,
    dataset: str | None = None,
    hub: Hub = NO_HUB,
    text_field: str | None = None,
    prompt_field: str | None = None,
    completion_field: str | None = None,
    messages_field: str | None = None,
    loss_on: Literal["completion", "all"] = "completion",
    test_fraction: float = 0.2,
    train_examples: int | None = None,
    test_examples: int | None = None,
    validation_examples: int | None = None,
    shots: int | None = None,
    seed: int = 0,
) -> TaskData:
    """Loads a task's examples, the same on all ranks, which may call this at the same time.

    task: a name in BUILTIN_TASKS, or where the examples are: a file, a pattern of several, a folder, or a
        data set of the hub, see `sources.read_source`.
    choices_field: column of a list of answers of each example's own; the label column then has the right
        one, or its index.
    data, dataset: for a built-in task, where its examples are, in place of its own data set of the hub.
    hub: what to take of a data set with several configurations or splits.
    test_data: a test file. Without one (and without a test split), `test_fraction` of the examples is
        held out: which ones depends on `seed` and each prompt only, not on the order of the rows.
    validation_data: a validation file, in place of the split that `hub` names.
    template, verbalizers, label_field: override the built-in's; see TaskSpec. For a file without
        verbalizers, the labels are themselves the words; if the file has no label column, or the
        template shows it, it is a language-model task.
    text_field, prompt_field, completion_field, messages_field: columns of a file without a template,
        where they are not called text, prompt, completion or messages; see `formats.format_of`. A template
        may stand for the prompt of a completion.
    loss_on: what trains of prompts with completions, and of conversations: the answers, or all.
    train_examples, test_examples: the most examples to take, chosen like the split.
    validation_examples: the most to take of the validation file or split; without one, how many training
        examples are held out for validation.
    shots: how many training examples of each label to take.

    Raises DataError, in one line, for anything wrong with the names, the files or their rows.
    """
    if not 0 <= test_fraction < 1:
        raise DataError(f"test_fraction is {test_fraction}; it must be at least 0 and below 1")
    bounds = {
        "train_examples": train_examples, "test_examples": test_examples, "shots": shots,
        "validation_examples": validation_examples,
    }  # fmt: skip
    for name, count in bounds.items():
        if count is not None and count < 1:
            raise DataError(f"{name} is {count}; it must be at least 1")
    source = _source(task, data, dataset, test_data)
    tables = (
        read_builtin(BUILTIN_TASKS[task]) if source is None else read_source(source, test_data, hub)
    )
    builtin = BUILTIN_TASKS[task] if source is None else None
    apart = read_validation(source, builtin, validation_data, hub)
    both = len(tables) == 2
    tables = [prepared(task, table) for table in (*tables, *([] if apart is None else [apart]))]
    fields = {
        "text": text_field, "prompt": prompt_field, "completion": completion_field,
        "messages": messages_field,
    }  # fmt: skip
    form = asked_format(task, tables[0], template, fields)
    if form is None:
        spec = _resolve_spec(task, tables, template, verbalizers, label_field, choices_field)
        splits = [_examples(table, spec) for table in tables]
        note = unlabelled(spec, tables[0].columns)
    else:
        if (verbalizers, label_field, choices_field) != (None, None, None):
            raise DataError(
                f"{task}: is of {form.told()}, which have no labels; leave verbalizers, label_field and "
                "choices_field out, or give a template"
            )
        asked = {"name": Path(task).stem, "template": template or f"{{{form.columns[0]}}}"}
        spec = _spec(task, asked)
        splits = [formatted(table, spec, form, loss_on == "all") for table in tables]
        note = form.told()
    unique = [deduplicate(examples) for examples in splits]
    duplicates = sum(len(s) for s in splits) - sum(len(u) for u in unique)
    given = None if apart is None else unique.pop()
    if both:
        train, test = unique
        kept = remove_prompts(train, test, tables)
    else:
        train, test = hold_out(unique[0], test_fraction, seed, tables[0].where)
        kept = train
    leaked = len(train) - len(kept)
    where = tables[0 if given is None else -1].where
    parts = with_validation(kept, test, given, where, validation_examples, seed)
    kept, leaked = parts.train, leaked + parts.leaked
    if shots is not None:
        kept = so_many_of_each(kept, shots, seed, tables[0].where)
    kept, test = subset(kept, train_examples, seed), subset(test, test_examples, seed)
    return TaskData(spec, kept, test, duplicates, leaked, note, parts.validation)


def _source(task: str, data: str | None, dataset: str | None, test_data: str | None) -> str | None:
    """Returns what to read; None for a built-in task's data set of the hub."""
    if None not in (data, dataset):
        raise DataError(
            f"data {data} and dataset {dataset} both say where the examples are; keep one"
        )
    given = dataset if data is None else data
    if task in BUILTIN_TASKS:
        if given is None and test_data is not None:
            raise DataError(f"test_data is given for task {task!r} without data; pass both")
        return given
    if not is_source(task):
        raise DataError(
            f"unknown task {task!r}; known: {', '.join(BUILTIN_TASKS)}, or a {', '.join(SUFFIXES)} file, a "
            "folder, or a data set of the hub such as org/name"
        )
    if data is not None or dataset not in (None, task):
        name = "dataset" if data is None else "data"
        raise DataError(
            f"{name} is given, but the task is itself a file ({task}); drop one of them"
        )
    return task


def _resolve_spec(
    task: str,
    tables: list[Table],
    template: str | None,
    verbalizers: Mapping[Any, str] | None,
    label_field: str | None,
    choices_field: str | None,
) -> TaskSpec:
    builtin = BUILTIN_TASKS.get(task)
    fields: dict[str, Any] = builtin.model_dump() if builtin else {"name": Path(task).stem}
    given = {"template": template, "label_field": label_field, "choices_field": choices_field}
    fields |= {name: value for name, value in given.items() if value is not None}
    if verbalizers is not None:
        if any(isinstance(label, float) and is_missing(label) for label in verbalizers):
            raise DataError(f"{task}: verbalizers: a label is missing (NaN); leave it out")
        fields["verbalizers"] = {str(label): word for label, word in verbalizers.items()}
    spec = _spec(task, fields)
    if builtin is None and verbalizers is None and choices_field is None:
        words = _labels_as_words(tables, spec, required=label_field is not None)
        spec = _spec(task, {**fields, "verbalizers": words})
    return spec


def _spec(task: str, fields: Mapping[str, Any]) -> TaskSpec:
    """Makes a spec; raises DataError, in one line, where a field is malformed."""
    try:
        return TaskSpec(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "task"
        message = first["msg"].removeprefix("Value error, ")
        raise DataError(f"{task}: {field}: {message}") from None


def _labels_as_words(tables: list[Table], spec: TaskSpec, required: bool) -> dict[str, str] | None:
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
        labels.update(text_of(table, n, row, column) for n, row in enumerate(table.rows, 1))
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


def _examples(table: Table, spec: TaskSpec) -> list[Example]:
    for column in spec.columns:
        check_column(table, column, "the template")
    if spec.verbalizers is not None or spec.choices_field is not None:
        check_column(table, spec.label_field, "label_field")
    for name in ("choices_field", "answer_field"):
        if (column := getattr(spec, name)) is not None:
            check_column(table, column, name)
    return [_example(table, number, row, spec) for number, row in enumerate(table.rows, 1)]


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
