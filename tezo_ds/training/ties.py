"""Watch over steps whose branches all gained the same: one teaches nothing, many in a row are said."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MANY = 10  # such steps in a row


class Ties:
    """Count of the last steps in a row that taught nothing; the same on all ranks.

    Args:
        before: κ of a resumed run's steps, from the first on.
    """

    def __init__(self, before: Iterable[Sequence[float | None]]) -> None:
        self.row = 0
        for kappa in before:
            self._add(all(k == 0 for k in kappa))

    def _add(self, tied: bool) -> None:
        self.row = self.row + 1 if tied else 0

    def step(self, tied: bool, name: str) -> str | None:
        """Takes in a step; returns a warning after every `MANY` ties in a row.

        Args:
            tied: whether all branches gave the same.
            name: of what they gave.
        """
        self._add(tied)
        if not self.row or self.row % MANY:
            return None
        return (
            f"the {name} has been the same in all branches of the last {self.row} steps, so they taught "
            "nothing; raise rho, queries or the batch size, or take a reward that tells small differences"
        )
