"""LOZO (arXiv 2410.07698): directions U_t Vᵀ with U fresh every step and V every ν steps."""

from __future__ import annotations

import torch
from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.directions.branches import Ask, LowRank
from tezo_ds.directions.draws import fresh_left
from tezo_ds.directions.lowrank import Factors
from tezo_ds.directions.rounding import Storing
from tezo_ds.directions.space import CoefficientSpace, Packed
from tezo_ds.methods.base import Method, Write
from tezo_ds.methods.descent import Descent, descent_of
from tezo_ds.sharding.view import ShardView


class LozoFactors(Factors):
    """Factors whose lefts are B, the change of this period, then U of each direction of a step.

    Attributes:
        change: B of all matrices, (m, rank) each, see `lefts`.
    """

    def __init__(self, space: CoefficientSpace, change: Packed, period: int = 0) -> None:
        super().__init__(space)
        self.change, self.period = change, period
        self._step = self._version = 0
        self._directions: tuple[int, ...] = ()

    def at(self, step: int, directions: tuple[int, ...]) -> None:
        """Moves to other directions of a step, or to a changed B."""
        self._step, self._directions, self.copies = step, directions, 1 + len(directions)
        self._version += 1
        self.renewed = self._version

    def drawn(self, name: str, step: int, q: int, rows: range, device: torch.device) -> Tensor:
        """Returns U of one direction on some rows: (len(rows), rank)."""
        places = torch.arange(rows.start, rows.stop, device=device)
        rank = self.matrices[name].rank
        return self.rounded(name, fresh_left(name, rank, self.space.seed, step, q, places))

    def of_change(self, name: str, rows: range) -> Tensor:
        """Returns B on some rows: (len(rows), rank)."""
        part = self.change.data[self.change.slices[name]]
        return part.view(-1, self.matrices[name].rank)[rows.start : rows.stop]

    def left(self, name: str, rows: range, device: torch.device | str) -> Tensor:
        device = torch.device(device)
        kept = self.of_change(name, rows).to(device, self.matrices[name].dtype)
        fresh = (self.drawn(name, self._step, q, rows, device) for q in self._directions)
        return torch.cat([kept, *fresh], dim=1)

    def scaled(self, view: ShardView, c: Tensor) -> Tensor:
        """Returns Σ_k L_k diag(c_k) on a shard's rows; draws no U that c does not use."""
        wide = torch.promote_types(view.local.dtype, torch.float32)
        device, rows = view.local.device, view.rows
        c = c.to(device, wide)
        total = self.of_change(view.name, rows).to(device, wide) * c[0]
        for place in c[1:].any(dim=1).nonzero()[:, 0].tolist():
            U = self.drawn(view.name, self._step, self._directions[place], rows, device)
            total += U.to(wide) * c[1 + place]
        return total


class Lozo(Method):
    """LOZO: B ← B - η s · Σ slope · U, or lozo-m's -η N with N ← βN + (1-β) s · Σ slope · U; every
    ν steps W ← W + B Vᵀ, B ← 0, a new V, and N ← N V_oldᵀ V_new / n.

    The direction that is applied is the one that was measured, U of the same draw and V of the same
    period. Within a period no weight is written. Vectors are kept aside for good.

    Args:
        space: what trains.
        change: zeros for B, see `lefts`.
        descent: descent of B.
        of_vectors: descent of the (D,) coefficients, of which the vectors' count.
        nu: ν, steps of a period.
        rank_scaling: s is 1/rank, as in the paper and not in its code; otherwise 1.
        storing: how 16-bit weights are rounded.
    """

    factors: LozoFactors
    writes = True
    in_tau = False

    def __init__(
        self,
        space: CoefficientSpace,
        change: Packed,
        descent: Descent,
        of_vectors: Descent,
        nu: int,
        rank_scaling: bool,
        storing: Storing,
    ) -> None:
        super().__init__(space)
        self.factors = LozoFactors(space, change)
        self._descent, self._of_vectors = descent, of_vectors
        self._nu, self._rank_scaling, self._storing = nu, rank_scaling, storing
        self._gradient = Packed(torch.zeros_like(change.data), change.slices)

    @property
    def state(self) -> dict[str, Packed]:
        slices = self.factors.change.slices
        moments = {name: Packed(data, slices) for name, data in self._descent.state.items()}
        of_vectors = self.moments_of_vectors(self._of_vectors)
        return {**super().state, "change": self.factors.change, **moments, **of_vectors}

    def begin(self, step: int) -> Write | None:
        """Ends a period every ν steps: W ← W + B Vᵀ, B ← 0, a new V."""
        if not step or step % self._nu:
            return None
        old = Packed(self.factors.change.data.clone(), self.factors.change.slices)
        ended = LowRank(self._of_change(0), LozoFactors(self.space, old, self.factors.period))
        store = self._storing.at("refresh", self.factors.period)
        for name, data in self._descent.state.items():
            assert name == "momentum", "moments of other kinds have no projection"
            self._project(Packed(data, old.slices))
        self.factors.change.data.zero_()
        self.factors.advance()
        return lambda view: ended.move_(view, None, 0, store)

    def _project(self, momentum: Packed) -> None:
        """Projects momentum on the next V: N ← N V_oldᵀ V_new / n of each matrix."""
        ahead = LozoFactors(self.space, self.factors.change, self.factors.period + 1)
        for name, matrix in self.factors.matrices.items():
            N = momentum.data[momentum.slices[name]].view(-1, matrix.rank)  # (m, rank)
            old, new = (
                factors.right(name, range(matrix.shape[1]), N.device).to(N.dtype)
                for factors in (self.factors, ahead)
            )
            N.copy_(N @ (old.t() @ new) / matrix.shape[1])

    def _of_change(self, count: int) -> Tensor:
        """Returns c of B alone, with room for `count` directions: (1, 1 + count, D)."""
        c = torch.zeros(1, 1 + count, self.space.numel, dtype=torch.float64)
        c[:, 0, self.space.of_matrices] = 1
        return c

    def branches(self, ask: Ask) -> LowRank:
        """Returns branches, of which only those asked for last can be used, as the lefts are theirs."""
        self.factors.at(ask.step, ask.directions)
        c = self._of_change(len(ask.directions)).repeat(len(ask), 1, 1)
        c[:, 1:, self.space.of_matrices] = ask.matrix()[..., None]
        vectors = self.space.of_vectors
        c[:, 0, vectors] = (self.coefficients + self.offsets(ask))[:, vectors]
        return LowRank(c, self.factors)

    def kept_aside(self) -> LowRank:
        self.factors.at(0, ())
        c = self._of_change(0)
        c[:, 0, self.space.of_vectors] = self.coefficients[self.space.of_vectors]
        idle = not bool(self.factors.change.data.any() or self.coefficients.any())
        return LowRank(c, self.factors, idle)

    def update(self, step: int, slopes: Tensor, gradient: Tensor, lr: float) -> Write | None:
        change, total = self.factors.change, self._gradient
        for matrix in self.space.matrices:
            scale = 1 / matrix.rank if self._rank_scaling else 1.0
            rows, part = range(matrix.shape[0]), total.data[total.slices[matrix.name]]
            part.zero_()
            for q, slope in enumerate(slopes.tolist()):
                if not slope:  # the direction failed
                    continue
                U = self.factors.drawn(matrix.name, step, q, rows, part.device)
                part.add_(U.flatten(), alpha=slope * scale)
        change.data.add_(self._descent.step(total.data, step + 1), alpha=-lr)
        if self.space.vectors:
            self.move_vectors(self._of_vectors.step(gradient, step + 1), lr)
        return None

    def merged(self) -> None:
        super().merged()
        self.factors.change.data.zero_()


def lefts(space: CoefficientSpace, device: torch.device) -> Packed:
    """Returns zeros, (m, rank) of each matrix; float32, or wider for weights that are."""
    slices, numel = {}, 0
    for matrix in space.matrices:
        slices[matrix.name] = slice(numel, numel + matrix.shape[0] * matrix.rank)
        numel = slices[matrix.name].stop
    dtype = torch.float32
    for matrix in space.matrices:
        dtype = torch.promote_types(dtype, matrix.dtype)
    return Packed(torch.zeros(numel, device=device, dtype=dtype), slices)


def make(config: TezoConfig, space: CoefficientSpace, device: torch.device) -> Lozo:
    """Makes LOZO from a config, at its start; the arguments are those of `make_method`."""
    change, coefficients = lefts(space, device), torch.zeros(space.numel, dtype=torch.float64)
    return Lozo(
        space, change, descent_of(config, change.data), descent_of(config, coefficients), config.nu,
        config.rank_scaling, Storing.of(config),
    )  # fmt: skip
