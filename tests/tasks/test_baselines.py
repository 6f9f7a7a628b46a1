"""Baselines of a task."""

from __future__ import annotations

import pytest

from tezo_ds.tasks.baselines import majority_accuracy
from tezo_ds.tasks.example import Example


def of(labels: str) -> list[Example]:
    return [Example(f"text {i}", label, f"word {label}") for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        ("aabbb", "abbb", 0.75),
        ("baab", "aabbb", 0.4),  # as frequent: the first in order
        ("abb", "aaa", 0.0),
        ("abb", "", None),
        ("", "ab", None),
    ],
)
def test_the_most_frequent_label_of_training_is_the_answer(
    train: str, test: str, expected: float | None
) -> None:
    assert majority_accuracy(of(train), of(test)) == expected


def test_a_language_model_task_has_none() -> None:
    texts = [Example("text", None, None)]
    assert majority_accuracy(texts, texts) is None
    assert majority_accuracy(of("ab"), texts) is None
