"""Watch over a run's loss: far above its start is said once, and ends the run where the user asks for it."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

from tezo_ds.errors import ProbeError

WINDOW = 20  # steps that a loss is the median of
FAR = 2.0  # times the loss at the start


class Divergence:
    """Comparison of the last losses with a run's first ones; the same on all ranks, as losses are.

    Args:
        before: losses of a resumed run's steps, from the first on.
        stops: whether a loss far above its start ends the run.
    """

    def __init__(self, before: Iterable[float | None], stops: bool) -> None:
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._stops, self._said = stops, False
        for loss in before:
            self._add(loss)
        self._said = self._far() is not None and not stops  # by the process that was there then

    def _add(self, loss: float | None) -> None:
        if loss is not None and loss == loss:  # neither null in the journal nor NaN
            self._last.append(loss)
            if len(self._first) < WINDOW:
                self._first.append(loss)

    def _far(self) -> tuple[float, float] | None:
        if len(self._last) < WINDOW:
            return None
        start, now = statistics.median(self._first), statistics.median(self._last)
        return (start, now) if now > FAR * start else None

    def step(self, loss: float, step: int) -> str | None:
        """Takes in a step's loss; returns a warning, once.

        Raises:
            ProbeError: the loss is far above its start, and that ends the run.
        """
        self._add(loss)
        if self._said or (found := self._far()) is None:
            return None
        self._said = True
        text = (
            f"the loss is {found[1]:.4g} after {step + 1} steps, and was {found[0]:.4g} at the start "
            f"(medians of {WINDOW} steps); lower lr or rho"
        )
        if self._stops:
            raise ProbeError(f"{text}, or leave --stop-on-divergence out")
        return text
