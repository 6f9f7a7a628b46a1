"""Answers of each example's own: read, encoded, and chosen from by their mean losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from task_files import write
from tiny import tiny
from tiny_tokenizer import tiny_tokenizer

import tezo_ds
from tezo_ds.errors import DataError
from tezo_ds.tasks import Example, TaskData, collate, encode, load_task
from tezo_ds.tasks.baselines import majority_accuracy
from tezo_ds.tasks.evaluation import Evaluator

ROWS = [
    {"text": "It rained, so", "choices": ["we got wet", "it was dry"], "label": 0},
    {"text": "He slept, so", "choices": ["he ran", "he woke", "he got wet"], "label": "he woke"},
    {"text": "She ran, so", "choices": '["she won", "it rained"]', "label": 1.0},
]
TEMPLATE = {"template": "{text}", "choices_field": "choices", "test_fraction": 0.0}


def loaded(tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> TaskData:
    return load_task(write(tmp_path / "rows.jsonl", rows), **{**TEMPLATE, **options})


def test_the_right_answer_is_given_by_itself_or_its_index(tmp_path: Path) -> None:
    task = loaded(tmp_path, ROWS)
    assert [(e.prompt, e.answer, len(e.candidates)) for e in task.train] == [
        ("It rained, so", "we got wet", 2), ("He slept, so", "he woke", 3), ("She ran, so", "it rained", 2),
    ]  # fmt: skip
    assert task.note is None and majority_accuracy(task.train, task.train) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"choices": "one"}, "column 'choices': is no list of two answers or more"),
        ({"choices": ["one"]}, "column 'choices': is no list of two answers or more"),
        ({"choices": ["one", " one"]}, "column 'choices': has the answer 'one' twice"),
        ({"choices": ["one", " "]}, "column 'choices': has an empty answer"),
        (
            {"label": 3},
            "column 'label': '3' is none of the 2 answers in column 'choices', nor the index",
        ),
        ({"label": "no"}, "column 'label': 'no' is none of the 2 answers"),
        ({"label": None}, "column 'label': missing or empty"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=f"row 2, {words}"):
        loaded(tmp_path, [ROWS[0], {**ROWS[0], "text": "x", **change}])
    with pytest.raises(DataError, match="verbalizers are words of all examples"):
        loaded(tmp_path, ROWS, verbalizers={"0": "a", "1": "b"})
    with pytest.raises(DataError, match="choices_field names column 'answers'; there are"):
        loaded(tmp_path, ROWS, choices_field="answers")


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_answer_of_the_lowest_mean_loss_is_chosen(tmp_path: Path, batch_size: int) -> None:
    texts = [f"{row['text']} {choice}" for row in ROWS for choice in row["choices"]]
    tokenizer = tiny_tokenizer(texts)
    model = tiny("llama")
    model.resize_token_embeddings(len(tokenizer))
    engine = tezo_ds.initialize(model.eval(), {"rank": 2})
    task = loaded(tmp_path, ROWS)

    def loss_of(example: Example) -> float:
        (encoded,) = encode(tokenizer, [example], 64)
        return engine.loss(collate([encoded], 2))

    correct, total, tokens = 0, 0.0, 0
    for example in task.train:
        losses = [loss_of(Example(example.prompt, None, word)) for word in example.candidates]
        right = example.candidates.index(str(example.answer))
        correct += min(range(len(losses)), key=losses.__getitem__) == right
        (encoded,) = encode(tokenizer, [example], 64)
        tokens += len(encoded.input_ids) - encoded.label_start
        total += losses[right] * (len(encoded.input_ids) - encoded.label_start)
    evaluator = Evaluator(engine, tokenizer, task.spec, task.train, batch_size, 64)
    # The longest first, so that batches are of like lengths.
    assert len(evaluator.encoded[0].input_ids) == max(len(e.input_ids) for e in evaluator.encoded)
    score = evaluator()
    assert score.accuracy == pytest.approx(correct / 3) and score.examples == 3
    assert score.loss == pytest.approx(total / tokens, rel=1e-4)
    assert torch.isfinite(torch.tensor(score.loss))
