"""The papers' tasks, from rows of the published schemas to examples; samples of so many of each label."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from task_files import WORDS, reviews, write

from tezo_ds.errors import DataError
from tezo_ds.tasks import BUILTIN_TASKS, TaskData, load_task

TEXT, PAIR = Value("string"), ClassLabel(names=["False", "True"])
NLI = ClassLabel(names=["entailment", "neutral", "contradiction"])
# Rows as the hub has them, their features, and the examples: prompt, answer.
SCHEMAS: dict[str, tuple[dict[str, Any], dict[str, Any], list[tuple[str, str]]]] = {
    "copa": (
        {"premise": ["It rained.", "He fell."], "choice1": ["We got wet.", "He slipped."],
         "choice2": ["It was dry.", "He flew."], "question": ["effect", "cause"], "label": [0, 1]},
        {"premise": TEXT, "choice1": TEXT, "choice2": TEXT, "question": TEXT,
         "label": ClassLabel(names=["choice1", "choice2"])},
        [("It rained so", "we got wet."), ("He fell because", "he flew.")],
    ),
    "record": (
        {"passage": ["A met B.\n@highlight\nC won"], "query": ["@placeholder lost to C"],
         "entities": [["A", "B", "A"]], "answers": [["B"]]},
        {"passage": TEXT, "query": TEXT, "entities": [TEXT], "answers": [TEXT]},
        [("A met B.\n- C won\n-", "B lost to C")],
    ),
    "squad": (
        {"title": ["T", "T"], "context": ["Ann is here.", "No."], "question": ["Who?", "Who else?"],
         "answers": [{"text": ["Ann", "Ann B"]}, {"text": []}]},
        {"title": TEXT, "context": TEXT, "question": TEXT, "answers": {"text": [TEXT]}},
        [("Title: T\nAnn is here.\nQuestion: Who?\nAnswer:", "Ann")],
    ),
    "drop": (
        {"passage": ["3 and 4."], "question": ["Sum?"], "answers_spans": [{"spans": ["7"]}]},
        {"passage": TEXT, "question": TEXT, "answers_spans": {"spans": [TEXT]}},
        [("3 and 4.\nQuestion: Sum?\nAnswer:", "7")],
    ),
    "snli": (
        {"premise": ["A cat sits.", "A dog."], "hypothesis": ["A cat.", "?"], "label": [0, -1]},
        {"premise": TEXT, "hypothesis": TEXT, "label": NLI},
        [('A cat sits.\nDoes it follow that "A cat."? Yes, Maybe or No?\nAnswer:', "Yes")],
    ),
    "mnli": (
        {"premise": ["A cat."], "hypothesis": ["A dog."], "label": [2]},
        {"premise": TEXT, "hypothesis": TEXT, "label": NLI},
        [('A cat.\nDoes it follow that "A dog."? Yes, Maybe or No?\nAnswer:', "No")],
    ),
    "qnli": (
        {"question": ["Who?"], "sentence": ["Ann is."], "label": [0]},
        {"question": TEXT, "sentence": TEXT, "label": ClassLabel(names=["entailment", "not_entailment"])},
        [('Ann is.\nDoes this answer the question "Who?"? Yes or No?\nAnswer:', "Yes")],
    ),
    "sst5": (
        {"text": ["A film"], "label": [3], "label_text": ["positive"]},
        {"text": TEXT, "label": Value("int64"), "label_text": TEXT},
        [("A film It was", "good")],
    ),
    "wic": (
        {"word": ["bank"], "sentence1": ["A bank."], "sentence2": ["The bank."], "label": [1]},
        {"word": TEXT, "sentence1": TEXT, "sentence2": TEXT, "label": PAIR},
        [('A bank.\nThe bank.\nDoes "bank" mean the same in both? Yes or No?\nAnswer:', "Yes")],
    ),
    "wsc": (
        {"text": ["Ann saw her."], "span1_text": ["Ann"], "span2_text": ["her"], "label": [0]},
        {"text": TEXT, "span1_text": TEXT, "span2_text": TEXT, "label": PAIR},
        [('Ann saw her.\nIs "her" here Ann? Yes or No?\nAnswer:', "No")],
    ),
    "multirc": (
        {"paragraph": ["P."], "question": ["Q?"], "answer": ["A"], "label": [1]},
        {"paragraph": TEXT, "question": TEXT, "answer": TEXT, "label": PAIR},
        [("P.\nQuestion: Q?\nAnswer: A\nIs this answer right? Yes or No?", "Yes")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", SCHEMAS)
def test_a_task_from_its_published_rows(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, features, expected = SCHEMAS[task]
    asked: list[Any] = []

    def load(name: str, config: str | None, split: str, revision: str | None) -> Dataset:
        asked.append((name, config, split))
        rows = Dataset.from_dict(columns, features=Features(features))
        if split == BUILTIN_TASKS[task].train_split:
            return rows
        changed = next(name for name in columns if features[name] == TEXT)  # of the prompt
        other = {**columns, changed: [f"Again {text}" for text in columns[changed]]}
        return Dataset.from_dict(other, features=Features(features))

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = load_task(task)
    assert [(e.prompt, e.answer) for e in found.train] == expected
    assert found.note is None and len(found.test) == len(expected)
    spec = BUILTIN_TASKS[task]
    assert asked == [
        (spec.hub_id, spec.hub_config, split) for split in (spec.train_split, spec.test_split)
    ]


def test_rows_that_are_not_as_published(tmp_path: Path) -> None:
    rows = [{"premise": "x", "choice1": "a", "choice2": "b", "question": "why", "label": 0}]
    (tmp_path / "copa").mkdir()
    write(tmp_path / "copa" / "train.jsonl", rows)
    with pytest.raises(DataError, match=r"train\.jsonl, row 1: is no row of copa \(KeyError"):
        load_task("copa", data=str(tmp_path / "copa"))
    own = [
        {"start": f"It rained {i} so", "choices": ["we got wet", "it was dry"], "label": 0}
        for i in range(9)
    ]
    write(tmp_path / "copa" / "train.jsonl", own)
    assert (
        load_task("copa", data=str(tmp_path / "copa"), test_fraction=0.0).train[0].answer
        == "we got wet"
    )


def sampled(path: str, **options: Any) -> TaskData:
    return load_task(
        path, template="{text} It was", verbalizers=WORDS, test_fraction=0.0, **options
    )


def test_so_many_examples_of_each_label(tmp_path: Path) -> None:
    path = write(tmp_path / "reviews.jsonl", reviews(40))
    found = sampled(path, shots=3)
    counts = {label: sum(e.label == label for e in found.train) for label in WORDS}
    assert set(counts.values()) == {3}
    assert found.train != sampled(path, shots=3, seed=1).train, "another seed, another sample"
    assert set(found.train) < set(sampled(path, shots=4).train), "more keep those that there were"
    with pytest.raises(DataError, match="training examples, and shots asks for 99"):
        sampled(path, shots=99)
    with pytest.raises(DataError, match="shots are examples of a label, and there are none"):
        load_task(path, text_field="text", test_fraction=0.0, shots=3)
    with pytest.raises(DataError, match="shots is 0; it must be at least 1"):
        sampled(path, shots=0)
