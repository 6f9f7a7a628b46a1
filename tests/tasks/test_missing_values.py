"""Cells with nothing in them: null, blank, and NaN as pandas and json.dumps write it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from task_files import TEMPLATE, WORDS, reviews, write

from tezo_ds.errors import DataError
from tezo_ds.tasks import load_task

NAN, INFINITY = math.nan, math.inf


def failure(path: Path, rows: list[dict[str, Any]], **options: Any) -> str:
    """Writes rows as an array or as lines, by the file's name, and returns what is wrong with them."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else lines)
    with pytest.raises(DataError) as caught:
        load_task(str(path), **{"template": TEMPLATE, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("nothing", [None, NAN, INFINITY, -INFINITY, "", " "])
@pytest.mark.parametrize("words", [None, WORDS])
def test_what_is_missing_is_named(
    tmp_path: Path, name: str, nothing: Any, words: dict[str, str] | None
) -> None:
    path = tmp_path / name
    for column, row in (
        ("label", {"text": "unlabelled", "label": nothing}),
        ("text", {"text": nothing, "label": "pos"}),
    ):
        expected = (
            f"{path}, row 5, column '{column}': missing or empty; fill it in or remove the row"
        )
        assert failure(path, [*reviews(4), row], verbalizers=words) == expected


def test_a_text_without_labels_may_not_be_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    message = failure(path, [{"text": "a"}, {"text": NAN}], template="{text}")
    assert message.startswith(f"{path}, row 2, column 'text': missing or empty")


def test_the_word_nan_is_a_text(tmp_path: Path) -> None:
    rows = [{"text": "nan", "label": "NaN"}, {"text": "b", "label": "bread"}]
    for name in ("a.jsonl", "a.csv"):
        lines = "".join(f"{row['text']},{row['label']}\n" for row in rows)
        (tmp_path / name).write_text("text,label\n" + lines)
        if name == "a.jsonl":
            write(tmp_path / name, rows)
        data = load_task(str(tmp_path / name), template=TEMPLATE, test_fraction=0)
        assert [(e.prompt, e.label) for e in data.train] == [
            ("nan It was", "NaN"),
            ("b It was", "bread"),
        ]


def test_nan_within_a_list_is_not_read_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    message = failure(path, [{"text": [NAN], "label": "pos"}], verbalizers=WORDS)
    assert message.startswith(f"{path}, row 1, column 'text': holds a list")
    message = failure(path, [{"text": "a", "label": {"x": NAN}}], verbalizers=WORDS)
    assert message.startswith(f"{path}, row 1, column 'label': holds a dict")


@pytest.mark.parametrize("nothing", [NAN, INFINITY])
def test_verbalizers_of_a_missing_label(tmp_path: Path, nothing: Any) -> None:
    path = tmp_path / "a.jsonl"
    words = {**WORDS, nothing: "okay"}
    expected = f"{path}: verbalizers: a label is missing (NaN); leave it out"
    assert failure(path, reviews(4), verbalizers=words) == expected
    message = failure(path, reviews(4), verbalizers={"neg": NAN, "pos": "great"})
    assert message == f"{path}: verbalizers.neg: Input should be a valid string"


def test_nan_off_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fake(*args: Any, **kwargs: Any) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [1.0, NAN]})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    with pytest.raises(DataError, match=r"row 2, column 'label': missing or empty"):
        load_task("sst2", verbalizers={"0": "terrible", "1": "great"})


def labels(path: Path, **options: Any) -> list[str | None]:
    data = load_task(str(path), template=TEMPLATE, test_fraction=0, **options)
    return [example.label for example in data.train]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_integers_of_a_column_that_had_gaps(tmp_path: Path, name: str) -> None:
    """Hazard: pandas makes floats of integers beside a missing value, and writes 1.0 for label 1."""
    path = tmp_path / name
    found = [0.0, 1.0, 1.0, -1.0]
    if name == "a.csv":
        path.write_text("text,label\n" + "".join(f"f{i},{x}\n" for i, x in enumerate(found)))
    else:
        write(path, [{"text": f"f{i}", "label": x} for i, x in enumerate(found)])
    words = {"0": "terrible", "1": "great", "-1": "okay"}
    assert labels(path, verbalizers=words) == ["0", "1", "1", "-1"]
    assert labels(path, verbalizers={float(k): w for k, w in words.items()}) == [
        "0.0", "1.0", "1.0", "-1.0"
    ]  # fmt: skip
    assert labels(path) == ["0.0", "1.0", "1.0", "-1.0"]


def test_a_whole_number_is_one_label_in_both_files(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [{"text": f"f{i}", "label": i % 2} for i in range(4)])
    test = write(tmp_path / "b.jsonl", [{"text": f"g{i}", "label": i / 2} for i in range(3)])
    data = load_task(train, test_data=test, template=TEMPLATE)
    assert list(data.spec.verbalizers or {}) == ["0", "0.5", "1"]
    assert [e.label for e in data.test] == ["0", "0.5", "1"]


def test_both_spellings_may_have_words_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, [{"text": f"f{i}", "label": x} for i, x in enumerate(("1", "1.0", 1.0))])
    assert labels(path, verbalizers={"1": "one", "1.0": "first"}) == ["1", "1.0", "1.0"]
    message = failure(path, [{"text": "a", "label": "1.5"}], verbalizers={"1": "one", "15": "two"})
    assert message == f"{path}, row 1: label '1.5' has no word; known: 1, 15"
