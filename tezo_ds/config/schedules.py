"""Schedules of the learning rate and of the number of directions."""

from __future__ import annotations

import math
from collections.abc import Callable

# Learning rates after the warm-up: share of the peak, by the share of the remaining steps that is done.
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}


def adaptive_queries(epoch: int, most: int, total_steps: int) -> int:
    """Returns TT-ZO's e^α for epoch e (from 0), rounded, within 1 and M: α = ln M / ln K, with M = `most` and
    K = `total_steps`. If an epoch were one step, M would be reached."""
    alpha = math.log(most) / math.log(max(2, total_steps))
    return min(max(round(epoch**alpha), 1), most)


def adazeta_queries(epoch: int, most: int, alpha: float, beta: float) -> int:
    """Returns AdaZeta's min(max(⌊α e^β⌋, 1), M), with e = `epoch` + 1 and M = `most`."""
    try:
        wanted = math.floor(alpha * (epoch + 1) ** beta)
    except OverflowError:  # more than float64 has, so more than any M
        return most
    return min(max(wanted, 1), most)
