"""Views of a distributed weight: the part that a rank holds, and the part that its forwards use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

ShardKey = tuple[str, int, int, int]


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Returns (m, n) of a parameter: the product of its leading dims, and its last.

    Raises:
        ValueError: `shape` has fewer than two dims.
    """
    if len(shape) < 2:
        raise ValueError(f"a matrix has two dims or more, not shape {tuple(shape)}")
    return math.prod(shape[:-1]), shape[-1]


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Returns (m, n) of any parameter, as its shards are described: a vector is one row."""
    return (1, math.prod(shape)) if len(shape) < 2 else matrix_shape(shape)


@dataclass(frozen=True)
class ShardView:
    """A contiguous range of the row-major elements of a matrix, or of some whole columns of it, held
    by this rank.

    Attributes:
        name: the model's own parameter name.
        shape: global (m, n).
        start: first element held, in the row-major order of (m, columns).
        local: the elements [start, stop) themselves, 1-D; writing to it writes the weight.
        columns: columns that the range runs over; None for all n. Tensor parallelism splits by column.
    """

    name: str
    shape: tuple[int, int]
    start: int
    local: Tensor
    columns: range | None = None

    @property
    def numel(self) -> int:
        """Elements held; 0 on a rank past the end."""
        return self.local.numel()

    @property
    def stop(self) -> int:
        """One past the last element held."""
        return self.start + self.numel

    @property
    def span(self) -> range:
        """The columns of the matrix that the range runs over."""
        return range(self.shape[1]) if self.columns is None else self.columns

    @property
    def width(self) -> int:
        """Number of columns in `span`."""
        return len(self.span)

    @property
    def key(self) -> ShardKey:
        """Identity of the range; under hpZ a rank holds two ranges of a parameter."""
        return self.name, self.start, self.numel, self.span.start

    @property
    def rows(self) -> range:
        """The rows of the matrix (hence of U) that the range touches, ragged ends included."""
        n = self.width
        return range(self.start // n, -(-self.stop // n)) if self.numel else range(0)

    def pieces(self, numel: int) -> Iterator[Piece]:
        """Yields the range as rectangles in row-major order: the end of a row, whole rows, the beginning
        of a row.

        Args:
            numel: elements of a piece at most, but one row at least.
        """
        n, first = self.width, self.span.start
        at_once = max(1, numel // n) * n
        place = self.start
        while place < self.stop:
            row, column = divmod(place, n)
            end = min(self.stop, place + at_once, (row + 1) * n if column else self.stop)
            if end - place > n:
                end -= end % n
            rows = range(row, -(-end // n))
            columns = range(first + column, first + column + (end - place) // len(rows))
            values = self.local[place - self.start : end - self.start].view(len(rows), -1)
            yield Piece(self.name, rows, columns, values)
            place = end


@dataclass(frozen=True)
class Piece:
    """A rectangle of a matrix that this rank holds.

    Attributes:
        name: the model's own parameter name.
        rows, columns: of the matrix.
        values: the elements themselves, (len(rows), len(columns)); writing to it writes the weight.
    """

    name: str
    rows: range
    columns: range
    values: Tensor


@dataclass(frozen=True)
class Block:
    """The rows and columns of a matrix that this rank's forwards multiply with, once gathered.

    Without tensor parallelism, the whole matrix.
    """

    rows: range
    columns: range

    def covers(self, shape: tuple[int, int]) -> bool:
        """Returns whether the block is the whole matrix."""
        return (len(self.rows), len(self.columns)) == shape


def place_in(whole: range, part: range) -> slice:
    """Returns the slice of `whole` that `part` is."""
    return slice(part.start - whole.start, part.stop - whole.start)
