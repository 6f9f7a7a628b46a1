"""Validation examples: where they come from, and that no prompt is in two parts."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict
from task_files import TEMPLATE, WORDS, Rows, prompts, reviews, write

from tezo_ds.errors import DataError
from tezo_ds.tasks import load_task
from tezo_ds.tasks.data import TaskData
from tezo_ds.tasks.sources import Hub

NAMED = {"template": TEMPLATE, "verbalizers": WORDS}


def apart(task: TaskData) -> tuple[set[str], set[str], set[str]]:
    """Returns the prompts of the three parts, which share none."""
    train, validation, test = (set(prompts(p)) for p in (task.train, task.validation, task.test))
    assert not train & validation and not train & test and not validation & test
    return train, validation, test


def test_a_file_loses_test_prompts_and_training_loses_its(tmp_path: Path) -> None:
    rows = reviews(30)
    data, test = write(tmp_path / "a.jsonl", rows), write(tmp_path / "t.jsonl", rows[:4])
    valid = write(tmp_path / "v.jsonl", [*rows[2:9], rows[8], {"text": "new", "label": "neg"}])
    task = load_task(data, test_data=test, validation_data=valid, **NAMED)
    train, validation, tested = apart(task)
    assert len(tested) == 4 and len(validation) == 6 and len(train) == 30 - 4 - 5
    assert (task.duplicates, task.leaked) == (1, 4 + 2 + 5)
    bounded = load_task(data, test_data=test, validation_data=valid, validation_examples=3, **NAMED)
    assert len(bounded.validation) == 3 and set(prompts(bounded.validation)) < validation
    plain = load_task(data, test_data=test, **NAMED)
    assert plain.test == task.test and not plain.validation
    with pytest.raises(DataError, match=r"t\.jsonl: every prompt is also in the test examples"):
        load_task(data, test_data=test, validation_data=test, **NAMED)


def test_without_a_file_they_are_held_out_of_training(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", reviews(60))
    plain, task = load_task(data, **NAMED), load_task(data, validation_examples=9, **NAMED)
    train, validation, _ = apart(task)
    assert task.test == plain.test and task.leaked == 0
    assert train | validation == set(prompts(plain.train)) and len(validation) == 9
    back = write(tmp_path / "b.jsonl", reviews(60)[::-1])
    assert apart(load_task(back, validation_examples=9, **NAMED)) == apart(task)
    assert len(load_task(data, validation_examples=9, train_examples=5, **NAMED).train) == 5
    with pytest.raises(DataError, match="validation examples leave none of"):
        load_task(data, validation_examples=60, **NAMED)


def test_a_held_out_prompt_is_held_out_with_all_its_completions(tmp_path: Path) -> None:
    rows: Rows = [{"prompt": f"p{i % 9}", "completion": f"c{i}"} for i in range(18)]
    task = load_task(write(tmp_path / "a.jsonl", rows), validation_examples=1, test_fraction=0.0)
    apart(task)
    assert (len(task.train), len(task.validation), task.leaked) == (16, 1, 1)


def test_splits_of_folders_and_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(9)]
    for name, part in (("train", rows[:6]), ("test", rows[6:8]), ("validation", rows[7:])):
        write(tmp_path / f"{name}.jsonl", part)
    asked = Hub(validation_split="validation")
    assert prompts(load_task(str(tmp_path), hub=asked).validation) == ["p8"]
    assert not load_task(str(tmp_path)).validation
    with pytest.raises(DataError, match=r"no dev\.jsonl or the like in this folder to validate"):
        load_task(str(tmp_path), hub=Hub(validation_split="dev"))
    splits = {"train": rows[:6], "test": rows[6:7], "dev": rows[7:]}
    saved = DatasetDict({name: Dataset.from_list(part) for name, part in splits.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    task = load_task(str(tmp_path / "saved"), hub=Hub(validation_split="dev"))
    assert (prompts(task.test), prompts(task.validation)) == (["p6"], ["p7", "p8"])
    with pytest.raises(DataError, match="has splits train, test, dev; name those"):
        load_task(str(tmp_path / "saved"), hub=asked)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, split, **__: Dataset.from_list(splits[split])
    )
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, **__: list(splits))
    task = load_task("org/chats", hub=Hub(validation_split="dev"))
    assert (prompts(task.test), prompts(task.validation)) == (["p6"], ["p7", "p8"])


def test_what_does_not_go_together(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", reviews(60))
    with pytest.raises(DataError, match="has no splits, of which validation_split names one"):
        load_task(data, hub=Hub(validation_split="v"), **NAMED)
    with pytest.raises(DataError, match="both say what to validate on; keep one"):
        load_task(data, validation_data=data, hub=Hub(validation_split="v"), **NAMED)
    with pytest.raises(DataError, match="validation_examples is 0; it must be at least 1"):
        load_task(data, validation_examples=0, **NAMED)
