"""Where examples come from: each kind of file, several at once, folders, the hub."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from task_files import write

from tezo_ds.errors import DataError
from tezo_ds.settings import Settings
from tezo_ds.tasks import load_task
from tezo_ds.tasks.sources import Hub

ROWS = [{"prompt": f"one {i}", "completion": f"two, {i}\tthree"} for i in range(6)]
EXPECTED = [(row["prompt"], row["completion"]) for row in ROWS]


def found(source: str | Path, **options: Any) -> list[tuple[str, str | None]]:
    task = load_task(str(source), test_fraction=0.0, **options)
    return [(example.prompt, example.answer) for example in task.train]


def test_files_of_every_kind(tmp_path: Path) -> None:
    jsonl = write(tmp_path / "rows.jsonl", ROWS)
    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "rows.parquet"))
    tabs = [["prompt", "completion"], *([p, f'"{c}"'] for p, c in EXPECTED)]
    (tmp_path / "rows.tsv").write_text("\n".join("\t".join(row) for row in tabs))
    assert (
        found(jsonl) == found(tmp_path / "rows.parquet") == found(tmp_path / "rows.tsv") == EXPECTED
    )
    for suffix, compress in (
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
    ):
        for name in ("rows.jsonl", "rows.parquet", "rows.tsv"):
            packed = tmp_path / f"{name}{suffix}"
            packed.write_bytes(compress((tmp_path / name).read_bytes()))
            assert found(packed) == EXPECTED
            packed.write_bytes(b"not packed")
            with pytest.raises(DataError, match=f"{name}{suffix}: cannot be read: "):
                found(packed)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"bad\.parquet: not a Parquet file"):
        found(tmp_path / "bad.parquet")


def test_several_files_and_where_a_row_of_them_is(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", ROWS[3:])
    write(tmp_path / "a.jsonl", ROWS[:3])
    assert found(tmp_path / "*.jsonl") == EXPECTED  # in the order of their names
    write(tmp_path / "b.jsonl", [*ROWS[3:5], {"prompt": "x", "completion": None}])
    with pytest.raises(DataError, match=r"b\.jsonl, row 3, column 'completion': missing or empty"):
        found(tmp_path / "*.jsonl")
    with pytest.raises(DataError, match="no file matches this pattern"):
        found(tmp_path / "*.csv")


def test_folders(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "train.jsonl.gz", "wb") as file:
        file.write(Path(write(tmp_path / "rows.jsonl", ROWS)).read_bytes())
    write(tmp_path / "test.jsonl", [{"prompt": "p", "completion": "c"}])
    task = load_task(str(tmp_path))
    assert [e.prompt for e in task.test] == ["p"] and len(task.train) == 6
    features = Features(text=Value("string"), label=ClassLabel(names=["bad", "good"]))
    labelled = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 1]}, features=features)
    saved = DatasetDict(train=labelled, validation=labelled.select([0]))
    saved.save_to_disk(str(tmp_path / "saved"))
    words = {"bad": "terrible", "good": "great"}
    task = load_task(
        str(tmp_path / "saved"),
        template="{text} was",
        verbalizers=words,
        hub=Hub(test_split="validation"),
    )
    assert [(e.prompt, e.label) for e in task.train] == [("b was", "good"), ("c was", "good")]
    assert [(e.prompt, e.answer) for e in task.test] == [("a was", "terrible")]
    with pytest.raises(
        DataError, match="has splits train, validation; name those to take by train_split"
    ):
        load_task(str(tmp_path / "saved"), template="{text} was", hub=Hub(train_split="train_sft"))
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "single"))
    assert found(tmp_path / "single") == EXPECTED


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, split: str, revision: str | None) -> Dataset:
        asked.append((name, config, split, revision))
        return Dataset.from_list(ROWS if split.startswith("train") else ROWS[:1])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train", "test"])
    task = load_task("org/chats")
    assert len(task.test) == 1 and task.leaked == 1 and len(task.train) == 5
    assert asked == [("org/chats", None, "train", None), ("org/chats", None, "test", None)]
    asked.clear()
    load_task("org/chats", hub=Hub("small", "v1", "train_sft", "test_sft"))
    assert asked == [
        ("org/chats", "small", "train_sft", "v1"),
        ("org/chats", "small", "test_sft", "v1"),
    ]
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: ["train"])
    assert len(found("org/chats")) == 6


def test_the_hub_cannot_be_reached() -> None:
    expected = (
        r"cannot reach org/none on the Hugging Face hub \(.*\); pass a file, or a folder with"
    )
    with pytest.raises(DataError, match=expected):
        load_task("org/none")


def test_a_dataset_stands_for_the_task_or_beside_it(tmp_path: Path) -> None:
    assert Settings(model="m", dataset="org/chats").task == "org/chats"
    assert Settings(model="m", dataset="org/chats", task="trec").task == "trec"
    path = write(
        tmp_path / "rows.jsonl", [{"text": f"Who is {i}?", "label": "HUM"} for i in range(3)]
    )
    assert len(load_task("trec", dataset=str(path), test_fraction=0.0).train) == 3
    for options, words in (
        ({"data": str(path), "dataset": str(path)}, "both say where the examples are"),
        ({"text_field": "text", "dataset": str(path)}, "a built-in task has its own columns"),
    ):
        with pytest.raises(DataError, match=words):
            load_task("trec", **options)
    with pytest.raises(DataError, match="dataset is given, but the task is itself a file"):
        load_task(str(path), dataset="org/other")
