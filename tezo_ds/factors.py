"""U, V and τ: the random factors of each matrix, whole or only the rows that a shard needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tezo_ds.rng import derive_key, normals

Rows = slice | range | Sequence[int] | Tensor


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(m, n) of a parameter: the product of its leading dims by its last.

    Raises:
        ValueError: `shape` has fewer than two dims.
    """
    if len(shape) < 2:
        raise ValueError(f"a matrix has two dims or more, not shape {tuple(shape)}")
    return math.prod(shape[:-1]), shape[-1]


def left_rows(name: str, rank: int, seed: int, rows: Tensor) -> Tensor:
    """Rows of U, float32 (len(rows), rank), on the device of `rows` (int64)."""
    return normals(derive_key(seed, name, "U"), rows, rank)


def right_rows(name: str, rank: int, seed: int, rows: Tensor) -> Tensor:
    """Rows of V, one for each column of the matrix: float32 (len(rows), rank), likewise."""
    return normals(derive_key(seed, name, "V"), rows, rank)


def factors(
    name: str, shape: Sequence[int], rank: int, seed: int, rows: Rows | None = None
) -> tuple[Tensor, Tensor]:
    """U and V of the parameter `name`: i.i.d. N(0, 1), fixed for the run (TeZO, arXiv 2501.19057).

    Args:
        name: the model's own parameter name.
        shape: its shape; seen as (m, n) = (product of leading dims, last).
        rank: r.
        seed: of the run.
        rows: only these rows of U (slice, range or indices); the same bits as in the whole U.

    Returns:
        U (m or len(rows), rank) and V (n, rank), float32 on the CPU.

    Raises:
        ValueError: fewer than two dims. IndexError: a row outside [0, m).
    """
    m, n = matrix_shape(shape)
    if rows is None:
        index = torch.arange(m)
    elif isinstance(rows, slice):
        index = torch.arange(*rows.indices(m))
    else:
        index = torch.as_tensor(rows, dtype=torch.int64)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < m:
        raise IndexError(f"{name}: rows {rows} are not all within [0, {m})")
    return left_rows(name, rank, seed, index), right_rows(name, rank, seed, torch.arange(n))


def tau(name: str, rank: int, seed: int, step: int, direction: int) -> Tensor:
    """τ of one direction of one step, i.i.d. N(0, 1): float32 (rank,) on the CPU."""
    return normals(derive_key(seed, name, "tau"), torch.tensor([direction]), rank, stream=step)[0]


def fresh_left(name: str, rank: int, seed: int, step: int, direction: int, rows: Tensor) -> Tensor:
    """Rows of the U that LOZO draws for one direction of one step, float32 (len(rows), rank), on the
    device of `rows` (int64)."""
    return normals(derive_key(seed, name, "LOZO U"), _at(direction, rows), rank, step)


def dense(name: str, seed: int, step: int, direction: int, rows: Tensor, columns: range) -> Tensor:
    """A rectangle of the dense Z of one direction of one step (MeZO): i.i.d. N(0, 1), float32
    (len(rows), len(columns)), on the device of `rows` (int64)."""
    key = derive_key(seed, name, "Z")
    return normals(key, _at(direction, rows), len(columns), step, columns.start)


def _at(direction: int, rows: Tensor) -> Tensor:
    """A counter for each row that no other direction has."""
    return rows + (direction << 40)


@dataclass(frozen=True)
class Matrix:
    """One trainable parameter seen as a matrix."""

    name: str
    shape: tuple[int, int]  # (m, n)
    rank: int
    dtype: torch.dtype = torch.float32  # of the weight in a forward, and so of U and V
    rounding: torch.dtype = torch.float32  # to which U and V were rounded before


class CoefficientSpace:
    """All coefficients of a run as one vector of D = Σ rank numbers, matrix after matrix.

    One vector, because an update of 10,000 matrices of 16 numbers each is otherwise all overhead.
    """

    def __init__(self, matrices: Sequence[Matrix], seed: int) -> None:
        self.matrices = tuple(matrices)
        self.seed = seed
        self.slices: dict[str, slice] = {}
        self.numel = 0
        for matrix in self.matrices:
            self.slices[matrix.name] = slice(self.numel, self.numel + matrix.rank)
            self.numel += matrix.rank
        keys = torch.tensor(
            [derive_key(seed, matrix.name, "tau") for matrix in self.matrices], dtype=torch.int64
        ).view(-1, 2)
        self._keys = keys[:, 0], keys[:, 1]
        ranks = torch.tensor([matrix.rank for matrix in self.matrices])
        self._width = int(ranks.max()) if len(ranks) else 0
        self._used = torch.arange(self._width) < ranks[:, None]  # (matrices, width)
        self._drawn = 0, torch.empty(0, 0, 0)  # first step, (steps, Q, D)

    def taus(self, step: int, directions: int) -> Tensor:
        """τ of every matrix for directions 0 … Q-1 of `step`: float32 (Q, D), bits as of `tau`."""
        first, drawn = self._drawn
        if not (first <= step < first + len(drawn) and drawn.shape[1] == directions):
            # Several steps ahead: a step's few thousand numbers are all overhead.
            drawn = self._draw(step, max(1, 32 // directions), directions)
            first, self._drawn = step, (step, drawn)
        return drawn[step - first]

    def _draw(self, step: int, steps: int, directions: int) -> Tensor:
        matrices = len(self.matrices)
        k0, k1 = (key.repeat(steps * directions) for key in self._keys)
        index = torch.arange(directions).repeat_interleave(matrices).repeat(steps)
        stream = torch.arange(step, step + steps).repeat_interleave(directions * matrices)
        z = normals((k0, k1), index, self._width, stream)
        return z.view(steps, directions, matrices, self._width)[:, :, self._used]

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a (D,) vector (or (…, D)) by parameter name."""
        return {name: vector[..., part] for name, part in self.slices.items()}
