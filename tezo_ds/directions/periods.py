"""U and V of several periods side by side, so that what ended ones learnt need not go into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tezo_ds.directions.lowrank import FixedFactors
from tezo_ds.directions.space import CoefficientSpace


class PeriodFactors(FixedFactors):
    """U = [U_0 … U_K] and V = [V_0 … V_K] of a run's periods, of rank (K + 1) r from the first step on.

    All are there from the start, as the shape of a product sets its last bits: a run that goes on, or a
    forward with its result, computes what the run did. Of periods to come the coefficients are zero.

    Attributes:
        space: of the wide coefficients, (K + 1) r a matrix.
        count: K + 1.

    Args:
        narrow: the run's own space, r a matrix.
        count: periods, at most.
    """

    def __init__(self, narrow: CoefficientSpace, count: int) -> None:
        wide = [replace(matrix, rank=count * matrix.rank) for matrix in narrow.matrices]
        super().__init__(CoefficientSpace(wide, narrow.seed, narrow.vectors))
        self.count = count
        self._narrow, self._each = narrow, [FixedFactors(narrow, p) for p in range(count)]
        starts = [self.space.slices[matrix.name].start for matrix in narrow.matrices]
        ranks = [matrix.rank for matrix in narrow.matrices]
        # Columns of each period's coefficients among the wide ones, those of matrices: (K + 1, Σ r)
        self._columns = torch.tensor(
            [
                [
                    start + p * r + i
                    for start, r in zip(starts, ranks, strict=True)
                    for i in range(r)
                ]
                for p in range(count)
            ],
            dtype=torch.int64,
        )

    def advance(self) -> None:
        self.period += 1  # U and V stay

    def left(self, name: str, rows: range, device: torch.device | str) -> Tensor:
        """Returns U on some rows of a matrix: (len(rows), (K + 1) r)."""
        return torch.cat([each.left(name, rows, device) for each in self._each], dim=1)

    def right(self, name: str, columns: range, device: torch.device | str) -> Tensor:
        """Returns V on some columns of a matrix: (len(columns), (K + 1) r)."""
        return torch.cat([each.right(name, columns, device) for each in self._each], dim=1)

    def placed(self, rows: Tensor, ended: Sequence[Tensor]) -> Tensor:
        """Returns wide coefficients of some branches of the running period, beside those of ended ones.

        Args:
            rows: a of each branch, float64 (branches, D).
            ended: a of each period before this one, (D,).

        Returns:
            float64 (branches, wide D).
        """
        of = self._narrow.of_matrices
        wide = torch.zeros(len(rows), self.space.numel, dtype=torch.float64)
        for columns, learnt in zip(self._columns, ended, strict=False):
            wide[:, columns] = learnt[of]
        wide[:, self._columns[self.period]] = rows[:, of]
        wide[:, self.space.of_vectors] = rows[:, self._narrow.of_vectors]
        return wide
