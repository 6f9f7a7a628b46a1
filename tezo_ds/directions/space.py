"""All coefficients of a run as one vector, and by parameter name as they are saved and loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tezo_ds.errors import ConfigError
from tezo_ds.rng.philox import derive_key, normals

AHEAD = 1 << 21  # numbers of τ drawn at a time, at most


@dataclass(frozen=True)
class Matrix:
    """One trainable parameter seen as a matrix."""

    name: str
    shape: tuple[int, int]  # (m, n)
    rank: int
    dtype: torch.dtype = torch.float32  # of the weight in a forward, and so of U and V
    rounding: torch.dtype = torch.float32  # to which U and V were rounded before


@dataclass(frozen=True)
class Vector:
    """One trainable parameter whose coefficients are its elements: of one dim, or an adapter's, flat."""

    name: str
    numel: int
    dtype: torch.dtype = torch.float32  # in a forward


@dataclass(frozen=True)
class Packed:
    """Numbers of many parameters in one 1-D tensor, and the slice of each parameter."""

    data: Tensor
    slices: Mapping[str, slice]

    def split(self) -> dict[str, Tensor]:
        """Returns views by parameter name."""
        return {name: self.data[part] for name, part in self.slices.items()}


class CoefficientSpace:
    """All coefficients of a run as one vector of D = Σ rank + Σ numel numbers, matrix after matrix and
    then vector after vector.

    One vector, because an update of 10,000 matrices of 16 numbers each is otherwise all overhead.
    """

    def __init__(
        self, matrices: Sequence[Matrix], seed: int, vectors: Sequence[Vector] = ()
    ) -> None:
        self.matrices, self.vectors = tuple(matrices), tuple(vectors)
        self.seed = seed
        widths = {matrix.name: matrix.rank for matrix in self.matrices}
        widths |= {vector.name: vector.numel for vector in self.vectors}
        self.slices: dict[str, slice] = {}
        self.numel = 0
        for name, width in widths.items():
            self.slices[name] = slice(self.numel, self.numel + width)
            self.numel += width
        self.of_matrices = slice(0, sum(matrix.rank for matrix in self.matrices))
        self.of_vectors = slice(self.of_matrices.stop, self.numel)
        self._drawers = [
            self._drawer([name for name in widths if widths[name] == width], width)
            for width in sorted(set(widths.values()))
        ]
        self._drawn: tuple[int, tuple[int, ...], Tensor] = 0, (), torch.empty(0, 0, 0)

    def _drawer(self, names: list[str], width: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """Returns key words (names,) and columns of D (names * width,) of parameters of one width."""
        keys = torch.tensor([derive_key(self.seed, name, "tau") for name in names])
        parts = [self.slices[name] for name in names]
        columns = torch.cat([torch.arange(part.start, part.stop) for part in parts])
        return keys[:, 0], keys[:, 1], columns, width

    def taus(self, step: int, directions: Sequence[int]) -> Tensor:
        """Returns τ of every parameter for some directions of `step`: float32 (Q, D), bits as `tau`'s."""
        directions = tuple(directions)
        first, held, drawn = self._drawn  # (steps, Q, D)
        if held != directions or not first <= step < first + len(drawn):
            # Several steps ahead: a step's few thousand numbers are all overhead.
            ahead = min(32, AHEAD // max(1, self.numel)) // max(1, len(directions))
            first, drawn = step, self._draw(step, max(1, ahead), directions)
            self._drawn = first, directions, drawn
        return drawn[step - first]

    def _draw(self, step: int, steps: int, directions: Sequence[int]) -> Tensor:
        count = len(directions)
        out = torch.empty(steps, count, self.numel)
        for k0, k1, columns, width in self._drawers:
            names = len(k0)
            key = k0.repeat(steps * count), k1.repeat(steps * count)
            index = (
                torch.tensor(directions, dtype=torch.int64).repeat_interleave(names).repeat(steps)
            )
            stream = torch.arange(step, step + steps).repeat_interleave(count * names)
            z = normals(key, index, width, stream).reshape(steps, count, len(columns))
            if len(columns) == self.numel:  # all of one width, in their order
                return z
            out[..., columns] = z
        return out

    def weighted(self, step: int, slopes: Tensor, directions: range) -> Tensor:
        """Returns 2ˢ Σ slope · τ over some directions: int64 (D,), so that sums are exact in any order.

        Args:
            step: step of τ.
            slopes: slopes of all directions of the step, float64 (Q,); s depends on them alone.
            directions: directions to sum over.
        """
        total = torch.zeros(self.numel, dtype=torch.int64)
        factor = 2.0 ** _bits(slopes)
        held = None
        if len(directions) * self.numel <= AHEAD:
            held = self.taus(step, directions)
        at_once = max(1, AHEAD // 16 // max(1, self.numel))  # so few stay in a processor's cache
        for start in range(directions.start, directions.stop, at_once):
            part = range(start, min(start + at_once, directions.stop))
            if held is None:
                tau = self._draw(step, 1, part)[0]
            else:
                tau = held[part.start - directions.start : part.stop - directions.start]
            terms = tau * (slopes[part.start : part.stop, None] * factor)  # float64
            total += terms.round_().to(torch.int64).sum(dim=0)
        return total

    def unweighted(self, total: Tensor, slopes: Tensor) -> Tensor:
        """Returns Σ slope · τ, float64 (D,), from the sum of `weighted` over all directions."""
        return total.double() * 2.0 ** -_bits(slopes)

    def pack(self, vector: Tensor) -> Packed:
        """Returns a (D,) vector with the names of its parts."""
        return Packed(vector, self.slices)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Returns views of a (D,) vector (or (…, D)) by parameter name."""
        return {name: vector[..., part] for name, part in self.slices.items()}


def _bits(slopes: Tensor) -> int:
    """Returns s for which no sum of 2ˢ · slope · τ leaves an int64; |τ| is below 8."""
    largest = slopes.abs().max().item() * len(slopes)
    return 59 - (math.frexp(largest)[1] if largest else 0)


def by_name(space: CoefficientSpace, rows: Tensor) -> dict[str, Tensor]:
    """Returns copies of the parts of (periods, D) by name: a matrix's a, (rank,) or, of several periods,
    (periods, rank); a vector's change so far, (numel,)."""
    last = {vector.name for vector in space.vectors} if len(rows) > 1 else space.slices.keys()
    return {
        name: (part[-1] if name in last else part).clone()
        for name, part in space.split(rows).items()
    }


def as_rows(space: CoefficientSpace, coefficients: Mapping[str, Tensor]) -> Tensor:
    """Inverse of `by_name`: float64 (periods, D), in which vectors are in the last row alone.

    Raises:
        ConfigError: names, ranks or periods are not those of the space or of each other.
    """
    if not isinstance(coefficients, Mapping):
        got = type(coefficients).__name__
        raise ConfigError(f"coefficients must be a dict of tensors by name, got {got}")
    if odd := coefficients.keys() ^ space.slices.keys():
        raise ConfigError(
            f"coefficients and engine differ in {len(odd)} parameters, e.g. {min(odd)}; "
            "use the run's own model, include and exclude"
        )
    periods = max(len(part) if part.dim() == 2 else 1 for part in coefficients.values())
    rows = torch.zeros(periods, space.numel, dtype=torch.float64)
    for name, part in space.split(rows).items():
        target = part[-1:] if space.slices[name].start >= space.of_vectors.start else part
        if coefficients[name].numel() != target.numel():
            several = f" in each of {periods} periods" if periods > 1 else ""
            raise ConfigError(
                f"{name}: {coefficients[name].numel()} coefficients, but rank is {part.shape[1]}"
                f"{several}; use the run's own rank"
            )
        target.copy_(coefficients[name].view(target.shape))
    return rows
