"""Examples of a task: read, checked, deduplicated, split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tezo_ds.errors import DataError
from tezo_ds.tasks import scan, splitting
from tezo_ds.tasks.builtin import BUILTIN_TASKS
from tezo_ds.tasks.example import Example, keeping_columns
from tezo_ds.tasks.formatted import asked_format, formatted
from tezo_ds.tasks.papers import prepared
from tezo_ds.tasks.reading import SUFFIXES
from tezo_ds.tasks.sources import Hub, is_source, read_builtin, read_source, read_validation
from tezo_ds.tasks.spec import MOST_CHOICES, TaskSpec
from tezo_ds.tasks.splitting import Asked
from tezo_ds.tasks.table import Table
from tezo_ds.tasks.templated import resolve_spec, spec_of, templated
from tezo_ds.tasks.unlabelled import unlabelled

NO_HUB = Hub()


@dataclass
class TaskData:
    """The examples of a task, no prompt twice in a split or across two of them."""

    spec: TaskSpec
    train: Sequence[Example]
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
    streaming: bool = False,
    columns: bool = False,
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
    streaming: whether rows stay in memory-mapped files, and training examples are made when they are asked
        for; they are those that there are without it, in the same order.
    columns: whether examples have the cells of their rows, and prompts need no completions.

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
    if streaming and shots is not None:
        raise DataError("shots chooses among the examples of a label; leave it or streaming out")
    source = _source(task, data, dataset, test_data)
    builtin = BUILTIN_TASKS[task] if source is None else None
    tables = _tables(source, builtin, test_data, hub, streaming)
    own_test = len(tables) == 2
    apart = read_validation(source, builtin, validation_data, hub, streaming)
    tables = [prepared(task, each) for each in (*tables, *([] if apart is None else [apart]))]
    fields = {
        "text": text_field, "prompt": prompt_field, "completion": completion_field,
        "messages": messages_field,
    }  # fmt: skip
    form = asked_format(task, tables[0], template, fields, columns)
    if form is None:
        most = MOST_CHOICES if streaming else None
        spec = resolve_spec(task, tables, template, verbalizers, label_field, choices_field, most)
        makers = [templated(table, spec) for table in tables]
        note = unlabelled(spec, tables[0].columns)
    else:
        if (verbalizers, label_field, choices_field) != (None, None, None):
            raise DataError(
                f"{task}: is of {form.told()}, which have no labels; leave verbalizers, label_field and "
                "choices_field out, or give a template"
            )
        named = {"name": Path(task).stem, "template": template or f"{{{form.columns[0]}}}"}
        spec = spec_of(task, named)
        makers = [formatted(table, spec, form, loss_on == "all") for table in tables]
        note = form.told()
    if columns:
        makers = [keeping_columns(make) for make in makers]
    asked = Asked(test_fraction, train_examples, test_examples, validation_examples, shots, seed)
    pairs = list(zip(tables, makers, strict=True))
    test, validation = pairs[1] if own_test else None, None if apart is None else pairs[-1]
    parts = (scan if streaming else splitting).split(pairs[0], test, validation, asked)
    return TaskData(
        spec, parts.train, parts.test, parts.duplicates, parts.leaked, note, parts.validation
    )


def _tables(
    source: str | None, builtin: TaskSpec | None, test_data: str | None, hub: Hub, streaming: bool
) -> list[Table]:
    """Returns the training table, and the test table if there is one."""
    if builtin is not None:
        return read_builtin(builtin, streaming)
    assert source is not None
    return read_source(source, test_data, hub, streaming)


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
