"""Strength of a ridge, chosen by examples that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

FOLD = 5  # every fifth example is held out to choose λ


@dataclass(frozen=True)
class Quality:
    """Mean cross-entropy among the words, and accuracy, of the examples that are held out."""

    loss: float
    accuracy: float


class Problem(Protocol):
    """A convex problem with a ridge of a strength to be chosen."""

    def least(self, x: Tensor, strength: float, held: bool | None, tolerance: float) -> Tensor:
        """Returns the x that is best, see `problem.Problem.least`."""

    def quality(self, x: Tensor) -> Quality:
        """Returns how well x does on the examples that are held out."""


def choose(
    problem: Problem, x: Tensor, strengths: Sequence[float], tolerance: float
) -> tuple[float, Quality, Tensor]:
    """Chooses λ, among strengths from the largest down, by the examples that are held out: returns it, how
    well the others' fit does there, and that fit, x."""
    best: tuple[float, Quality, Tensor] | None = None
    for strength in strengths:
        x = problem.least(x, strength, False, tolerance)  # begun where the stronger ridge ended
        quality = problem.quality(x)
        if best is not None and quality.loss >= best[1].loss:
            break  # weaker ones, which take longest, are worse still
        best = strength, quality, x
    assert best is not None
    return best
