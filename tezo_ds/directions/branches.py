"""Branches b of a step, at whose W + Δ_b a probe measures losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tezo_ds.directions.lowrank import Factors, Store, add_low_rank_
from tezo_ds.sharding.view import ShardView

AT_ONCE = 1 << 20  # numbers of ±ρτ made at a time, at most


@dataclass(frozen=True)
class Ask:
    """Some branches of one step.

    Attributes:
        step: the step that the directions belong to.
        rho: ρ.
        signs: direction and sign of each branch; (None, 0) for the centre, which has no direction.
    """

    step: int
    rho: float
    signs: tuple[tuple[int | None, int], ...]

    @classmethod
    def of(cls, step: int, directions: Iterable[int], rho: float, central: bool = True) -> Ask:
        """Returns + and - of each direction; if not central, the centre and then + of each."""
        if central:
            signs = [(q, sign) for q in directions for sign in (1, -1)]
            return cls(step, rho, tuple(signs))
        return cls(step, rho, ((None, 0), *((q, 1) for q in directions)))

    def __len__(self) -> int:
        return len(self.signs)

    @property
    def directions(self) -> tuple[int, ...]:
        """Directions that occur, each once, in order."""
        return tuple(dict.fromkeys(q for q, _ in self.signs if q is not None))

    def parts(self, at_once: int) -> Iterator[Ask]:
        """Yields the same branches, `at_once` at a time; 0: all."""
        at_once = at_once or len(self)
        for start in range(0, len(self), at_once):
            yield replace(self, signs=self.signs[start : start + at_once])

    def times(self, taus: Tensor) -> Tensor:
        """Returns ±ρτ of each branch's direction, from τ of `directions`: float64 (branches, D)."""
        place = {q: i for i, q in enumerate(self.directions)}
        of = [(b, place[q], sign) for b, (q, sign) in enumerate(self.signs) if q is not None]
        branches, rows, signs = torch.tensor(of, dtype=torch.int64).view(-1, 3).unbind(dim=1)
        offsets = torch.zeros(len(self), taus.shape[1], dtype=torch.float64)
        scales, at_once = signs.double() * self.rho, max(1, AT_ONCE // max(1, taus.shape[1]))
        for k in range(0, len(rows), at_once):
            part = slice(k, k + at_once)
            offsets[branches[part]] = taus[rows[part]] * scales[part, None]
        return offsets

    def matrix(self) -> Tensor:
        """Returns ±ρ of each direction in each branch: float64 (branches, directions)."""
        return self.times(torch.eye(len(self.directions)))


class Branches(ABC):
    """Changes Δ_0 … Δ_{k-1} of the trained parameters.

    Attributes:
        idle: every Δ is zero.
    """

    idle: bool

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def move_(self, view: ShardView, start: int | None, end: int | None) -> None:
        """Moves a shard in place, W ← W - Δ_start + Δ_end; None stands for no change."""


class LowRank(Branches):
    """Low-rank changes Δ_b = Σ_k L_k diag(c_bk) Vᵀ of each matrix, and c_b0 itself of each vector.

    Attributes:
        c: (branches, copies, D) float64 on the CPU.
        factors: L and V.
    """

    def __init__(self, c: Tensor, factors: Factors, idle: bool | None = None) -> None:
        self.c, self.factors = c, factors
        self.idle = not bool(c.any()) if idle is None else idle

    def __len__(self) -> int:
        return len(self.c)

    def part(self, columns: slice) -> Tensor:
        """Returns c of some columns, (branches, copies, width)."""
        return self.c[..., columns]

    def move_(
        self, view: ShardView, start: int | None, end: int | None, store: Store | None = None
    ) -> None:
        """Moves a shard in place, as in `Branches`; `store` is that of `add_low_rank_`."""
        # (copies, rank) or, of a vector, (copies, numel)
        c = between(self.part(self.factors.space.slices[view.name]), start, end)
        if view.name in self.factors.matrices:
            if view.numel and c.any():
                add_low_rank_(
                    view, self.factors.scaled(view, c), self.factors.right_of(view), store
                )
        else:
            add_vector_(view, c[0], store)


class Spread(LowRank):
    """Changes a ± ρτ that are made when they are asked for: those of many numbers in many branches would
    take more memory than the forward."""

    def __init__(self, a: Tensor, ask: Ask, taus: Tensor, factors: Factors) -> None:
        self._a, self._ask, self._taus, self.factors = a, ask, taus, factors
        self.idle = not (bool(a.any()) or any(sign * ask.rho for _, sign in ask.signs))

    def __len__(self) -> int:
        return len(self._ask)

    @property
    def c(self) -> Tensor:  # type: ignore[override]
        """All of c, (branches, 1, D)."""
        return self.part(slice(None))

    def part(self, columns: slice) -> Tensor:
        return self._ask.times(self._taus[:, columns]).add_(self._a[columns])[:, None]


def between(c: Tensor, start: int | None, end: int | None) -> Tensor:
    """Returns c_end - c_start, None for zeros; c is (branches, …)."""
    zeros = torch.zeros_like(c[0])
    return (zeros if end is None else c[end]) - (zeros if start is None else c[start])


def add_vector_(view: ShardView, change: Tensor, store: Store | None = None) -> None:
    """Adds in place, w ← w + change, on the elements that a view holds; change is whole, (numel,)."""
    wide = torch.promote_types(view.local.dtype, torch.float32)
    change = change.to(view.local.device, wide)
    for piece in view.pieces(max(1, view.numel)):
        values = piece.values.to(wide) + change[piece.columns.start : piece.columns.stop]
        if store is None:
            piece.values.copy_(values)
        else:
            store(piece, values)


def kappas(losses: Tensor, rho: float, central: bool) -> Tensor:
    """Returns κ of each direction, (L⁺ - L⁻) / 2ρ or (L⁺ - L) / ρ: float64 (groups, directions), NaN
    where a loss is not finite.

    Args:
        losses: float64 (groups, branches), of ranks that measured directions of their own; branches
            as `Ask.of` orders them.
        rho: ρ.
        central: both signs of each direction, or a centre and one sign.
    """
    if central:
        found = (losses[:, 0::2] - losses[:, 1::2]) / (2 * rho)
    else:
        found = (losses[:, 1:] - losses[:, :1]) / rho
    return torch.where(found.isfinite(), found, torch.nan)
