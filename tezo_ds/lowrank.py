"""In-place rank-r updates of a shard that may begin and end in the middle of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from tezo_ds.factors import CoefficientSpace, left_rows, right_rows
from tezo_ds.sharding.view import Block, ShardKey, ShardView

BLOCK_BYTES = 1 << 24  # of float32 temporaries; small beside one layer of a model worth sharding


class ShardFactors:
    """U and V as a shard needs them: the rows of either that it touches, on its device.

    Both are rounded to the dtype that the weights had in the run's forwards, so that every user of a
    run (probes, merge, export) means the same direction.

    Args:
        space: the run's matrices and seed.
        keep: hold on to what was made, for those who ask again every step.
    """

    def __init__(self, space: CoefficientSpace, keep: bool) -> None:
        self._seed = space.seed
        self._matrices = {matrix.name: matrix for matrix in space.matrices}
        self._kept: dict[ShardKey, tuple[Tensor, Tensor]] | None = {} if keep else None

    def __call__(self, view: ShardView) -> tuple[Tensor, Tensor]:
        """U (len(view.rows), rank) and V (view.width, rank)."""
        if self._kept is not None and view.key in self._kept:
            return self._kept[view.key]
        columns = range(view.shape[1]) if view.columns is None else view.columns
        made = self.of(view.name, Block(view.rows, columns), view.local.device)
        if self._kept is not None:
            self._kept[view.key] = made
        return made

    def of(
        self, name: str, block: Block | None = None, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """U (len(block.rows), rank) and V (len(block.columns), rank) of a block of a matrix; of the
        whole matrix without one."""
        matrix = self._matrices[name]
        block = block or Block(*map(range, matrix.shape))
        rows, columns = (
            torch.arange(places.start, places.stop, device=device)
            for places in (block.rows, block.columns)
        )
        U = left_rows(name, matrix.rank, self._seed, rows)
        V = right_rows(name, matrix.rank, self._seed, columns)
        U, V = (factor.to(matrix.rounding).to(matrix.dtype) for factor in (U, V))
        return U, V


def add_low_rank_(view: ShardView, U: Tensor, V: Tensor, coefficient: Tensor) -> None:
    """W ← W + U diag(c) Vᵀ on the elements that `view` holds, without a full-size temporary.

    Sums are formed in float32 (float64 for float64 weights) and rounded to the shard's dtype once.

    Args:
        view: the shard.
        U: (len(view.rows), rank), only the rows that the range touches.
        V: (view.width, rank), only those of the columns that the range runs over.
        coefficient: c, (rank,).
    """
    n = view.width
    if view.numel == 0:
        return
    wide = torch.promote_types(view.local.dtype, torch.float32)
    scaled = U.to(wide) * coefficient.to(U.device, wide)  # (rows, rank)
    Vt = V.to(wide).t()  # (rank, n)
    head = min(view.numel, -view.start % n)  # elements before the first whole row
    whole, tail = divmod(view.numel - head, n)
    ragged = int(head > 0)  # rows of `scaled` that the head takes
    if head:
        column = view.start % n
        _add_rows_(view.local[None, :head], scaled[:1], Vt[:, column : column + head])
    rows = view.local[head : head + whole * n].view(whole, n)
    _add_rows_(rows, scaled[ragged : ragged + whole], Vt)
    if tail:
        _add_rows_(view.local[None, -tail:], scaled[-1:], Vt[:, :tail])


def _add_rows_(rows: Tensor, scaled: Tensor, Vt: Tensor) -> None:
    """rows (k, n) += scaled (k, rank) @ Vt (rank, n)."""
    if rows.dtype == scaled.dtype:
        rows.addmm_(scaled, Vt)
        return
    step = max(1, BLOCK_BYTES // (scaled.itemsize * rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        block = rows[start : start + step]
        block.copy_(torch.addmm(block.to(Vt.dtype), scaled[start : start + step], Vt))
