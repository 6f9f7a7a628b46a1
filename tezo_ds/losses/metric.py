"""Metrics of a batch's predictions as objectives: what is counted of each, and the loss that the counts make.

    accuracy    1 - right / n                             counts (1 if wrong, 1) of each of n predictions
    f1          1 - mean over classes of 2 h / (p + t)    h hits of a class, p predictions, t labels of it

F1 is macro F1 over the classes that are predicted or are labels, as scikit-learn's. It is no mean over
predictions, so counts of classes are what adds up over micro-batches and ranks.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Metric = Literal["accuracy", "f1"]


def wrong(words: Tensor, right: Tensor) -> Tensor:
    """Returns 1 for each prediction that is not the right one, 0 for others; NaN where a logit is not finite,
    as a largest one is found among those, too.

    Args:
        words: logits, (branches, j, words).
        right: index of the right word, int64 (j,).

    Returns:
        float32 (branches, j).
    """
    missed = (words.argmax(dim=-1) != right).float()
    return missed.where(words.isfinite().all(dim=-1), torch.nan)


def class_counts(words: Tensor, right: Tensor) -> Tensor:
    """Returns hits of each of C classes, and predictions and labels of it together, for each prediction:
    float32 (branches, j, 2 C), hits first; arguments as of `wrong`."""
    classes = words.shape[-1]
    labels = F.one_hot(right, classes).float()  # (j, C)
    hits = labels * (1 - wrong(words, right))[..., None]  # (branches, j, C)
    return torch.cat([hits, F.one_hot(words.argmax(dim=-1), classes) + labels], dim=-1)


def counted(sums: Tensor, metric: Metric | None) -> Tensor:
    """Returns how many predictions, or with None weights of a loss, sums (S, …) are of: (…)."""
    return sums[len(sums) // 2 :].sum(dim=0) / 2 if metric == "f1" else sums[1]


def loss_of(sums: Tensor, metric: Metric | None) -> Tensor:
    """Returns the loss of sums over all micro-batches and ranks.

    Args:
        sums: (S, …); S is 2 C of F1; otherwise 2, losses and counts.
        metric: what was counted; None: a loss.

    Returns:
        Losses, (…), in [0, 1] of a metric.
    """
    if metric != "f1":
        return sums[0] / sums[1]
    hits, both = sums.chunk(2)  # (C, …) each
    there = both > 0
    each = torch.where(there, 2 * hits / both, 0.0)
    return 1 - each.sum(dim=0) / there.sum(dim=0)
