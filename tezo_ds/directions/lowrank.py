"""Low-rank changes of a weight: their factors, as a shard or a layer needs them, and adding them to a
shard that may begin and end in the middle of a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from tezo_ds.directions.draws import left_rows, right_rows
from tezo_ds.directions.space import CoefficientSpace
from tezo_ds.sharding.view import Block, Piece, ShardKey, ShardView, place_in

BLOCK_NUMEL = 1 << 22  # elements of a shard worked on at a time; as float32 they are 16 MiB

Store = Callable[[Piece, Tensor], None]  # puts wide values (rows, columns) into a piece
Lent = Callable[[], tuple[Tensor, Tensor]]
Make = Callable[[str, range, torch.device], Tensor]

LEFT, RIGHT = 0, 1


class Factors(ABC):
    """Factors of changes Σ_k L_k diag(c_k) Vᵀ of each matrix: `copies` lefts that share one right.

    L and V are rounded to the dtype that the weights had in the run's forwards, so that every user of a
    run (probes, merge, export) means the same direction.

    Attributes:
        space: the matrices (and vectors) that change.
        copies: lefts of each matrix.
        period: changes when V does, and every left with it; see `advance`.
        renewed: changes when the lefts do within a period.
    """

    copies = 1
    period = 0
    renewed = 0

    def __init__(self, space: CoefficientSpace) -> None:
        self.space = space
        self.matrices = {matrix.name: matrix for matrix in space.matrices}
        self.keep = False  # hold on to what shards need, for those who ask again every step
        self._lent: dict[str, tuple[Block, Lent]] = {}
        self._kept: dict[tuple[ShardKey, int], Tensor] = {}  # by shard and LEFT or RIGHT

    def advance(self) -> None:
        """Moves to the next period: V of the next seed."""
        self.period += 1
        self._lent.clear()
        self._kept.clear()

    @abstractmethod
    def left(self, name: str, rows: range, device: torch.device | str) -> Tensor:
        """Returns [L_1 … L_k] on some rows of a matrix: (len(rows), copies * rank)."""

    @abstractmethod
    def scaled(self, view: ShardView, c: Tensor) -> Tensor:
        """Returns Σ_k L_k diag(c_k) on the rows that a shard touches, (len(view.rows), rank) in float32
        or wider; c is (copies, rank)."""

    def right(self, name: str, columns: range, device: torch.device | str) -> Tensor:
        """Returns V on some columns of a matrix: (len(columns), rank)."""
        places = torch.arange(columns.start, columns.stop, device=device)
        rank, seed = self.matrices[name].rank, self.space.seed + self.period
        return self.rounded(name, right_rows(name, rank, seed, places))

    def right_of(self, view: ShardView) -> Tensor:
        """Returns V on the columns that a shard runs over: (view.width, rank)."""
        return self._for_shard(view, RIGHT, view.span, self.right)

    def _for_shard(self, view: ShardView, side: int, places: range, make: Make) -> Tensor:
        """Returns a factor on some rows or columns: one kept, a part of one lent, or a new one."""
        if (view.key, side) in self._kept:
            return self._kept[view.key, side]
        if view.name in self._lent:
            block, lent = self._lent[view.name]
            held = (block.rows, block.columns)[side]
            if held.start <= places.start and places.stop <= held.stop:
                return lent()[side][place_in(held, places)]
        made = make(view.name, places, view.local.device)
        if self.keep:
            self._kept[view.key, side] = made
        return made

    def rounded(self, name: str, factor: Tensor) -> Tensor:
        """Returns a factor rounded as all users of a run round it."""
        return factor.to(self.matrices[name].rounding).to(self.matrices[name].dtype)

    def lend(self, name: str, block: Block, lent: Lent) -> None:
        """Lends L (rows, copies * rank) and V (columns, rank) of a block that the caller keeps for this
        period, so that shards need no others."""
        self._lent[name] = block, lent


class FixedFactors(Factors):
    """U and V of TeZO: they stay until a refresh, and then come from the next seed.

    Args:
        space: the run's matrices and seed.
        period: refreshes so far.
    """

    def __init__(self, space: CoefficientSpace, period: int = 0) -> None:
        super().__init__(space)
        self.period = period

    def left(self, name: str, rows: range, device: torch.device | str) -> Tensor:
        """Returns U on some rows of a matrix: (len(rows), rank)."""
        places = torch.arange(rows.start, rows.stop, device=device)
        rank, seed = self.matrices[name].rank, self.space.seed + self.period
        return self.rounded(name, left_rows(name, rank, seed, places))

    def left_of(self, view: ShardView) -> Tensor:
        """Returns U on the rows that a shard touches: (len(view.rows), rank)."""
        return self._for_shard(view, LEFT, view.rows, self.left)

    def scaled(self, view: ShardView, c: Tensor) -> Tensor:
        """Returns U diag(c) on the rows that a shard touches."""
        wide = torch.promote_types(view.local.dtype, torch.float32)
        return self.left_of(view).to(wide) * c[0].to(view.local.device, wide)

    def of(
        self, name: str, block: Block | None = None, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Returns U (len(block.rows), rank) and V (len(block.columns), rank) of a block of a matrix, or
        of the whole matrix."""
        block = block or Block(*map(range, self.matrices[name].shape))
        return self.left(name, block.rows, device), self.right(name, block.columns, device)


def add_low_rank_(view: ShardView, scaled: Tensor, V: Tensor, store: Store | None = None) -> None:
    """Adds in place, W ← W + L Vᵀ, on the elements that a view holds, without a full-size temporary.

    Sums are formed in float32 (float64 for float64 weights) and rounded to the shard's dtype once.

    Args:
        view: the shard.
        scaled: L (len(view.rows), rank), only the rows that the range touches.
        V: (view.width, rank), only for the columns that the range runs over.
        store: how a sum goes into the shard; rounds to the nearest by default.
    """
    wide = torch.promote_types(view.local.dtype, torch.float32)
    # Kept factors may lie in another layout than new ones, and a product's last bits depend on that.
    scaled = scaled.to(wide).contiguous()  # (rows, rank)
    Vt = V.to(wide).contiguous().t()  # (rank, n)
    for piece in view.pieces(BLOCK_NUMEL):
        left = scaled[place_in(view.rows, piece.rows)]  # (rows, rank)
        right = Vt[:, place_in(view.span, piece.columns)]
        if piece.values.dtype == wide:
            piece.values.addmm_(left, right)
        elif store is None:
            piece.values.copy_(torch.addmm(piece.values.to(wide), left, right))
        else:
            store(piece, torch.addmm(piece.values.to(wide), left, right))
