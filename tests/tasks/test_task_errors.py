"""Bad data and options: the whole message, so that each says what, where and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from task_files import TEMPLATE, WORDS, reviews, write

from tezo_ds.errors import DataError
from tezo_ds.tasks import BUILTIN_TASKS, load_task

pytest_plugins = ("offline",)
pytestmark = pytest.mark.usefixtures("no_network")


def failure(task: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_task(task, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.jsonl", "", ": the file is empty"),
        ("blank.jsonl", " \n\n", ": the file is empty"),
        ("header.csv", "text,label\n", ": the file has a header and no rows"),
        ("array.json", "[]", ": the file is empty"),
        (
            "broken.jsonl",
            '{"text": "a"}\n{"text": "b"\n',
            ", line 2: not valid JSON: Expecting ',' delimiter",
        ),
        ("list.jsonl", '{"text": "a"}\n[1]\n', ", line 2: not a JSON object"),
        (
            "broken.json",
            '[{"text": "a"},\n{"text": }]',
            ", line 2: not valid JSON: Expecting value",
        ),
        (
            "latin.jsonl",
            b'{"text": "a"}\n{"text": "\xe9"}\n',
            ", line 2: not UTF-8; save the file as UTF-8",
        ),
        ("twice.csv", "text,text\na,b\n", ", line 1: column 'text' is there twice; rename one"),
        (
            "commas.csv",
            "text,label\na,b,x\nc,d,y\n",
            ", line 2: the row has 3 fields, the header 2; quote fields with commas",
        ),
        (
            "null.jsonl",
            '{"text": "a", "label": "x"}\n{"text": "b", "label": null}\n',
            ", row 2, column 'label': missing or empty; fill it in or remove the row",
        ),
        (
            "short.csv",
            "text,label\na,x\nb\n",
            ", row 2, column 'label': missing or empty; fill it in or remove the row",
        ),
        (
            "spaces.csv",
            "text,label\na,x\nb, \n",
            ", row 2, column 'label': missing or empty; fill it in or remove the row",
        ),
        (
            "notext.jsonl",
            '{"text": "a"}\n{"text": ""}\n',
            ", row 2, column 'text': missing or empty; fill it in or remove the row",
        ),
        (
            "nested.jsonl",
            '{"text": ["a"]}\n',
            ", row 1, column 'text': holds a list; only text and numbers can be used",
        ),
        (
            "other.csv",
            "body,label\na,x\nb,y\n",
            ": the template names column 'text'; there are: body, label",
        ),
    ],
)
def test_bad_files(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    content: str | bytes,
    expected: str,
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert failure(str(path), template="{text}") == f"{path}{expected}"
    assert capfd.readouterr() == ("", "")  # the message is the only thing that is said


def test_unknown_names_and_missing_files(tmp_path: Path) -> None:
    known = ", ".join(BUILTIN_TASKS)
    assert known.startswith("trec, rotten-tomatoes, sst2, sst5, ")
    expected = (
        f"unknown task 'imdb'; known: {known}, or a .jsonl, .json, .csv, .tsv, .parquet file, a "
    )
    expected += "folder, or a data set of the hub such as org/name"
    assert failure("imdb") == expected
    missing = str(tmp_path / "no.jsonl")
    assert failure(missing, template="{text}") == f"{missing}: no such file or folder"
    assert failure("trec", data=missing) == f"{missing}: no such file or folder"
    expected = f"{tmp_path}: no train.jsonl, train.json or train.csv in this folder"
    assert failure("trec", data=str(tmp_path)) == expected
    path = write(tmp_path / "train.jsonl", reviews(2))
    assert failure(path, template="{text}", test_data=missing) == f"{missing}: no such file"
    (tmp_path / "train.csv").write_text("text,label\na,b\n")
    expected = f"{tmp_path}: train.jsonl, train.csv are all there; keep one of them"
    assert failure("trec", data=str(tmp_path)) == expected
    text = tmp_path / "a.txt"
    text.write_text("x")
    assert failure("trec", data=str(text)) == (
        f"{text}: not a .jsonl, .json, .csv, .tsv, .parquet file, nor one of these with .gz, .bz2, .xz"
    )


def test_labels_without_a_word(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*reviews(2), {"text": "meh", "label": "mixed"}])
    expected = f"{path}, row 3: label 'mixed' has no word; known: neg, pos"
    assert failure(path, template=TEMPLATE, verbalizers=WORDS) == expected
    same = write(tmp_path / "same.jsonl", reviews(1))
    expected = f"{same}: all labels in column 'label' are 'neg'; a task needs two"
    assert failure(same, template=TEMPLATE) == expected
    expected = f"{path}: label_field names column 'stars'; there are: text, label"
    assert failure(path, template=TEMPLATE, verbalizers=WORDS, label_field="stars") == expected
    assert failure(path, template=TEMPLATE, label_field="stars") == expected
    test = write(tmp_path / "test.jsonl", [{"text": "a"}])
    expected = f"{test}: label_field names column 'label'; there are: text"
    assert failure(path, template=TEMPLATE, test_data=test) == expected


def test_nothing_left_to_train_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", reviews(3))
    test = write(tmp_path / "b.jsonl", reviews(5))
    expected = f"{path}: every prompt is also in {test}"
    assert failure(path, template=TEMPLATE, test_data=test) == expected
    expected = (
        f"{path}: 3 prompts split into 3 for training and 0 for test;"
        " change test_fraction (1e-09) or pass test_data"
    )
    assert failure(path, template=TEMPLATE, test_fraction=1e-9) == expected


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", reviews(4))
    expected = (
        f"{path}: has columns 'text' and 'label'; give a template, such as '{{text}} It was', or "
    )
    assert failure(path).startswith(expected)
    expected = f"data is given, but the task is itself a file ({path}); drop one of them"
    assert failure(path, template=TEMPLATE, data=path) == expected
    expected = "test_data is given for task 'trec' without data; pass both"
    assert failure("trec", test_data=path) == expected
    expected = "test_fraction is 1; it must be at least 0 and below 1"
    assert failure(path, template=TEMPLATE, test_fraction=1) == expected
    expected = "train_examples is 0; it must be at least 1"
    assert failure(path, template=TEMPLATE, train_examples=0) == expected


@pytest.mark.parametrize(
    ("template", "verbalizers", "expected"),
    [
        ("{text", WORDS, "template: template '{text': expected '}' before end of string"),
        ("{}", WORDS, "template: template '{}': only plain {column} fields can be used"),
        (
            "{text!r}",
            WORDS,
            "template: template '{text!r}': only plain {column} fields can be used",
        ),
        ("text", WORDS, "template: template 'text' names no column; write one as {column}"),
        (
            "{text} ",
            WORDS,
            "task: the template ends in whitespace; the answer follows after one space",
        ),
        ("{text} {label}", WORDS, "task: the template shows the label column 'label'"),
        (
            "{text}",
            {"pos": "good"},
            "verbalizers: verbalizers need at least two labels, got ['pos']",
        ),
        ("{text}", {}, "verbalizers: verbalizers need at least two labels, got []"),
        (
            "{text}",
            {"neg": "ok", "pos": "ok"},
            "verbalizers: labels 'neg' and 'pos' share the word 'ok'",
        ),
        (
            "{text}",
            {"neg": " bad", "pos": "ok"},
            "verbalizers: verbalizer ' bad' of label 'neg' is blank or padded",
        ),
        ("{text}", {"neg": 0, "pos": "ok"}, "verbalizers.neg: Input should be a valid string"),
    ],
)
def test_malformed_specs(
    tmp_path: Path, template: str, verbalizers: dict[str, Any], expected: str
) -> None:
    path = write(tmp_path / "a.jsonl", reviews(4))
    message = failure(path, template=template, verbalizers=verbalizers)
    assert message == f"{path}: {expected}"


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*args: Any, **kwargs: Any) -> None:
        # The error is said once, by us: datasets' own log is silent meanwhile.
        assert datasets.logging.get_verbosity() == datasets.logging.CRITICAL
        raise ConnectionError("no route\nto host")

    verbosity = datasets.logging.get_verbosity()
    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert failure("boolq") == (
        "cannot reach google/boolq on the Hugging Face hub (ConnectionError: no route);"
        " pass --data FOLDER, a folder with train.jsonl and test.jsonl"
    )
    assert datasets.logging.get_verbosity() == verbosity < datasets.logging.CRITICAL
