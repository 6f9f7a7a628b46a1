"""What a task gives without any training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tezo_ds.tasks.example import Example
from tezo_ds.tasks.lazy import LazyExamples


def majority_accuracy(train: Sequence[Example], test: Sequence[Example]) -> float | None:
    """Returns the accuracy on `test` of always answering with the most frequent label of `train`, of equally
    frequent ones the first in their order; None where there are no labels or no test examples."""
    if isinstance(train, LazyExamples):
        counts = train.labels
    else:
        counts = Counter(example.label for example in train if example.label is not None)
    if not counts or not test or any(example.label is None for example in test):
        return None
    most = max(sorted(counts), key=lambda label: counts[label])
    return sum(example.label == most for example in test) / len(test)
