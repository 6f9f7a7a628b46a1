"""MeZO (arXiv 2305.17333): dense directions, made anew on the shards that a rank holds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.directions.branches import Ask, Branches, add_vector_, between
from tezo_ds.directions.draws import dense
from tezo_ds.directions.lowrank import BLOCK_NUMEL
from tezo_ds.directions.rounding import Storing
from tezo_ds.directions.space import CoefficientSpace, Packed
from tezo_ds.errors import StorageError
from tezo_ds.methods.base import Method, Write
from tezo_ds.methods.descent import Descent, descent_of
from tezo_ds.sharding.view import Piece, ShardKey, ShardView


class Dense(Branches):
    """Changes Δ = ±ρZ_q of each matrix, Z_q i.i.d. N(0, 1), and c_b of each vector."""

    def __init__(self, space: CoefficientSpace, c: Tensor, ask: Ask) -> None:
        self._space, self._c, self._ask = space, c, ask
        self._matrices = {matrix.name for matrix in space.matrices}
        self.idle = not ask.directions and not bool(c.any())

    def __len__(self) -> int:
        return len(self._c)

    def move_(self, view: ShardView, start: int | None, end: int | None) -> None:
        """Moves a shard in place, as in `Branches`; draws Z once where both are of one direction."""
        if view.name not in self._matrices:
            add_vector_(view, between(self._c[:, self._space.slices[view.name]], start, end))
            return
        amounts: dict[int, float] = {}  # by direction
        for branch, way in ((start, -1), (end, 1)):
            q, sign = (None, 0) if branch is None else self._ask.signs[branch]
            if q is not None:
                amounts[q] = amounts.get(q, 0.0) + way * sign * self._ask.rho
        if not amounts:
            return
        wide = torch.promote_types(view.local.dtype, torch.float32)
        for piece in view.pieces(BLOCK_NUMEL):
            values = piece.values.to(wide)  # the weight itself where it is that wide
            for q, amount in amounts.items():
                values.add_(of_piece(piece, self._space.seed, self._ask.step, q), alpha=amount)
            if values.dtype != piece.values.dtype:
                piece.values.copy_(values)


class Mezo(Method):
    """MeZO: W ← W - η · descent(G) with G = Σ slope · Z, the mean over directions of κZ, every step.

    Moments are dense: they lie beside the shards, each rank's for its own.

    Args:
        space: what trains.
        descent: makes one for a tensor of a shard's shape: SGD (mezo), momentum (mezo-m) or Adam
            (mezo-adam).
        storing: how 16-bit weights are rounded.
    """

    writes = True
    in_tau = False

    def __init__(
        self, space: CoefficientSpace, descent: Callable[[Tensor], Descent], storing: Storing
    ) -> None:
        super().__init__(space)
        self._make, self._storing = descent, storing
        self._of_vectors = descent(self.coefficients)
        self._of_shards: dict[tuple[ShardKey, int], Descent] = {}  # by shard and piece of it
        self._matrices = {matrix.name for matrix in space.matrices}

    @property
    def state(self) -> dict[str, Packed]:
        return {**super().state, **self.moments_of_vectors(self._of_vectors)}

    def branches(self, ask: Ask) -> Dense:
        return Dense(self.space, self.coefficients + self.offsets(ask), ask)

    def kept_aside(self) -> Dense:
        return Dense(self.space, self.coefficients.clone()[None], Ask.of(0, (), 0.0, central=False))

    def update(self, step: int, slopes: Tensor, gradient: Tensor, lr: float) -> Write | None:
        first, *rest = slopes.tolist()
        self.move_vectors(self._of_vectors.step(gradient, step + 1), lr)
        store = self._storing.at("update", step)

        def write(view: ShardView) -> None:
            if view.name not in self._matrices:
                return
            wide = torch.promote_types(view.local.dtype, torch.float32)
            for place, piece in enumerate(view.pieces(BLOCK_NUMEL)):
                G = of_piece(piece, self.space.seed, step, 0).to(wide).mul_(first)
                for q, slope in enumerate(rest, start=1):
                    if not slope:  # the direction failed
                        continue
                    G.add_(of_piece(piece, self.space.seed, step, q), alpha=slope)
                if (view.key, place) not in self._of_shards:
                    self._of_shards[view.key, place] = self._make(G)
                change = self._of_shards[view.key, place].step(G, step + 1)
                store(piece, torch.add(piece.values, change, alpha=-lr))
                del G, change  # or they would still be there when the next G is made

        return write

    def moments(self, view: ShardView) -> dict[str, Tensor]:
        places = range(len(list(view.pieces(BLOCK_NUMEL))))
        kept = [d for p in places if (d := self._of_shards.get((view.key, p))) is not None]
        kinds = kept[0].state if kept else ()
        return {kind: torch.cat([d.state[kind].flatten() for d in kept]) for kind in kinds}

    def set_moments(self, view: ShardView, moments: Mapping[str, Tensor]) -> None:
        wide, start = torch.promote_types(view.local.dtype, torch.float32), 0
        for place, piece in enumerate(view.pieces(BLOCK_NUMEL)):
            self._of_shards.pop((view.key, place), None)
            if not moments:
                continue
            made = self._make(torch.empty_like(piece.values, dtype=wide))
            if made.state.keys() != moments.keys():
                raise StorageError(
                    f"{view.name}: there are {', '.join(moments)} beside its shards, and the run's method "
                    f"keeps {', '.join(made.state) or 'none'}; use the method that they are of"
                )
            stop = start + piece.values.numel()
            for kind, tensor in made.state.items():
                tensor.copy_(moments[kind][start:stop].view_as(tensor))
            self._of_shards[view.key, place] = made
            start = stop


def of_piece(piece: Piece, seed: int, step: int, q: int) -> Tensor:
    """Returns Z of one direction on a piece: (rows, columns) float32."""
    rows = torch.arange(piece.rows.start, piece.rows.stop, device=piece.values.device)
    return dense(piece.name, seed, step, q, rows, piece.columns)


def make(config: TezoConfig, space: CoefficientSpace, device: torch.device) -> Mezo:
    """Makes MeZO from a config, at its start; the arguments are those of `make_method`."""
    return Mezo(space, functools.partial(descent_of, config), Storing.of(config))
