"""TeZO-Adam as published: moments of τ, and a quotient of two matrices that no factors can hold."""

from __future__ import annotations

import torch
from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.directions.lowrank import BLOCK_NUMEL
from tezo_ds.directions.rounding import Storing
from tezo_ds.directions.space import CoefficientSpace
from tezo_ds.methods.base import Write
from tezo_ds.methods.descent import Adam
from tezo_ds.methods.tezo import Tezo
from tezo_ds.sharding.view import Piece, ShardView, place_in


class TezoAdam(Tezo):
    """TeZO-Adam: τ_M ← β₁τ_M + (1-β₁)κτ, τ_V ← β₂τ_V + (1-β₂)(κτ)², W ← W - η M / (√V + ε) with
    M = U diag(τ_M) Vᵀ and V = (U∘U) diag(τ_V) (V∘V)ᵀ: the second moment without its cross terms.

    State is two r-vectors a matrix. The quotient is formed and written block by block on the shards
    that a rank holds. Vectors take plain Adam steps, kept aside.

    Args:
        space: what trains.
        adam: Adam of the (D,) coefficients.
        refresh_every: steps; 0: never.
        storing: how 16-bit weights are rounded.
    """

    descent: Adam

    def __init__(
        self, space: CoefficientSpace, adam: Adam, refresh_every: int, storing: Storing
    ) -> None:
        super().__init__(space, adam, refresh_every, storing)
        self.writes = True

    def update(self, step: int, slopes: Tensor, gradient: Tensor, lr: float) -> Write | None:
        self._age += 1
        change = self.descent.step(gradient, self._age)
        self.move_vectors(change, lr)
        first, second = self.descent.corrections(self._age)
        moment1 = self.space.split(self.descent.state["moment1"] * first)
        moment2 = self.space.split(self.descent.state["moment2"] * second)
        store = self._storing.at("update", step)

        def write(view: ShardView) -> None:
            if view.name not in self.factors.matrices or not view.numel:
                return
            wide = torch.promote_types(view.local.dtype, torch.float32)
            device = view.local.device
            U, V = (f.to(wide) for f in (self.factors.left_of(view), self.factors.right_of(view)))
            UM, UV = U * moment1[view.name].to(device, wide), U * U
            UV *= moment2[view.name].to(device, wide)
            Vt = V.t()
            Vt2 = Vt * Vt  # (rank, n)

            def quotient(piece: Piece) -> Tensor:
                rows, columns = place_in(view.rows, piece.rows), place_in(view.span, piece.columns)
                root = (UV[rows] @ Vt2[:, columns]).sqrt_().add_(self.descent.eps)
                return (UM[rows] @ Vt[:, columns]).div_(root)

            for piece in view.pieces(BLOCK_NUMEL):  # each gone before the next is made
                store(piece, quotient(piece).mul_(-lr).add_(piece.values))

        return write


def make(config: TezoConfig, space: CoefficientSpace, device: torch.device) -> TezoAdam:
    """Makes TeZO-Adam from a config, at its start; the arguments are those of `make_method`."""
    coefficients = torch.zeros(space.numel, dtype=torch.float64)
    adam = Adam(coefficients, config.betas, config.eps, config.bias_correction)
    return TezoAdam(space, adam, config.refresh_every, Storing.of(config))
