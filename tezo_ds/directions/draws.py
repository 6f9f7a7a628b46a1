"""U, V and τ: the random factors of each matrix, whole or only the rows that a shard needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tezo_ds.rng.philox import derive_key, normals
from tezo_ds.sharding.view import matrix_shape

Rows = slice | range | Sequence[int] | Tensor


def left_rows(name: str, rank: int, seed: int, rows: Tensor) -> Tensor:
    """Returns rows of U, float32 (len(rows), rank), on the device of `rows` (int64)."""
    return normals(derive_key(seed, name, "U"), rows, rank)


def right_rows(name: str, rank: int, seed: int, rows: Tensor) -> Tensor:
    """Returns rows of V, one a column of the matrix: float32 (len(rows), rank), on the device of `rows`."""
    return normals(derive_key(seed, name, "V"), rows, rank)


def factors(
    name: str, shape: Sequence[int], rank: int, seed: int, rows: Rows | None = None
) -> tuple[Tensor, Tensor]:
    """Returns U and V of a parameter: i.i.d. N(0, 1), fixed for the run (TeZO, arXiv 2501.19057).

    Args:
        name: the model's own parameter name.
        shape: the parameter's shape; seen as (m, n) = (product of leading dims, last).
        rank: r.
        seed: the run's seed.
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
    """Returns τ of one direction of one step, i.i.d. N(0, 1): float32 (rank,) on the CPU."""
    return normals(derive_key(seed, name, "tau"), torch.tensor([direction]), rank, stream=step)[0]


def fresh_left(name: str, rank: int, seed: int, step: int, direction: int, rows: Tensor) -> Tensor:
    """Returns rows of the U that LOZO draws for one direction of one step, float32 (len(rows), rank), on
    the device of `rows` (int64)."""
    return normals(derive_key(seed, name, "LOZO U"), _at(direction, rows), rank, step)


def dense(name: str, seed: int, step: int, direction: int, rows: Tensor, columns: range) -> Tensor:
    """Returns a rectangle of the dense Z of one direction of one step (MeZO): i.i.d. N(0, 1), float32
    (len(rows), len(columns)), on the device of `rows` (int64)."""
    key = derive_key(seed, name, "Z")
    return normals(key, _at(direction, rows), len(columns), step, columns.start)


def _at(direction: int, rows: Tensor) -> Tensor:
    """Returns a counter for each row that no other direction has."""
    return rows + (direction << 40)
