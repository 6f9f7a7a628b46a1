"""Watch over the steps of a method that solves: many that move nothing are said once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

WINDOW = 20  # steps
SHARE = 0.5  # of them


class Stalls:
    """Count of the last steps whose solve moved nothing; the same on all ranks.

    Args:
        before: what a resumed run's steps solved for, from the first on.
    """

    def __init__(self, before: Iterable[Sequence[float]]) -> None:
        self._last: deque[bool] = deque(maxlen=WINDOW)
        self._said = False
        for solved in before:
            self._add(solved)
            self._said |= self._many  # by the process that was there then

    def _add(self, solved: Sequence[float]) -> None:
        self._last.append(not any(solved))

    @property
    def _many(self) -> bool:
        return len(self._last) == WINDOW and sum(self._last) >= SHARE * WINDOW

    def step(self, solved: Sequence[float]) -> str | None:
        """Takes in what a step solved for, one number a direction; returns a warning, once."""
        self._add(solved)
        if self._said or not self._many:
            return None
        self._said = True
        return (
            f"{sum(self._last)} of the last {WINDOW} steps moved nothing: of a batch of this size the noise "
            "alone foresees as much as was measured; a larger batch_size (say four times) sees further, and "
            "takes as much longer"
        )
