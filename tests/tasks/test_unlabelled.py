"""A file without the label column: said, with the column that may have been meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_fixtures import make_given
from command_line import Given, call, flags
from task_files import TEMPLATE, WORDS, reviews, write

from tezo_ds.errors import DataError
from tezo_ds.tasks import load_task

SAID = "no column 'label': the whole text is trained on"


def note(path: Path, columns: list[str], **options: Any) -> str | None:
    rows = [dict.fromkeys(columns, f"value {i}") for i in range(4)]
    named = {"template": f"{{{columns[0]}}}", **options}
    return load_task(write(path / "a.jsonl", rows), test_fraction=0, **named).note


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Label", "Label"), ("LABEL", "LABEL"), ("labels", "labels"), ("lable", "lable"),
        (" label", '" label"'), ("label ", '"label "'), ("Labels ", '"Labels "'),
        ("label_text", "label_text"), ("coarse-label", '"coarse-label"'),
    ],
)  # fmt: skip
def test_near_names(tmp_path: Path, name: str, shown: str) -> None:
    expected = f"{SAID}; if column {name!r} is the label, add --label-field {shown}"
    assert note(tmp_path, ["text", "id", name]) == expected


def test_no_near_name(tmp_path: Path) -> None:
    assert note(tmp_path, ["text"]) == SAID
    assert note(tmp_path, ["text", "title", "table", "date"]) == SAID
    assert note(tmp_path, ["labels", "text"]) == SAID  # the template shows it


def test_nothing_is_said_where_the_label_was_found(tmp_path: Path) -> None:
    assert note(tmp_path, ["text", "label"]) is None
    assert note(tmp_path, ["label", "text"]) is None  # in the template, as asked
    assert note(tmp_path, ["text", "Label"], label_field="Label") is None


def test_the_column_that_csv_pads(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text, label\nfine,pos\nbad,neg\n")
    data = load_task(str(tmp_path / "a.csv"), template="{text}", test_fraction=0)
    assert data.note == f"{SAID}; if column ' label' is the label, add --label-field \" label\""


def test_words_for_labels_that_are_not_there_are_refused(tmp_path: Path) -> None:
    rows = [{"text": r["text"], "Label": r["label"]} for r in reviews(4)]
    with pytest.raises(DataError, match="names column 'label'; there are: text, Label"):
        load_task(write(tmp_path / "a.jsonl", rows), template=TEMPLATE, verbalizers=WORDS)


def test_training_and_evaluating_say_it_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: Given = make_given(tmp_path)
    rows = [json.loads(line) for line in given.data.read_text().splitlines()]
    path = write(tmp_path / "b.jsonl", [{"text": r["text"], "Label": r["label"]} for r in rows])
    named = {"model": given.model, "task": path, "template": "{text}"}
    more = {"output": tmp_path / "run", "steps": 1, "batch_size": 2, "rank": 2}
    assert call("train", *flags({**named, **more})) == 0
    expected = f"{SAID}; if column 'Label' is the label, add --label-field Label\n"
    assert capsys.readouterr().out.count(expected) == 1
    assert call("evaluate", "--run", tmp_path / "run") == 0
    assert capsys.readouterr().err.count(expected) == 1
