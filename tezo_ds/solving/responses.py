"""Responses of the logits along a step's directions, and their Gram matrix, for Gauss-Newton.

    z_b = z + Σ_q M_bq z'_q                 logits of branch b, M = ±ρ of each direction in each branch
    H_qr = Σ_i [Σ_v p_v z'_q z'_r - (Σ_v p_v z'_q)(Σ_v p_v z'_r)]
    g_q = Σ_i [Σ_v p_v z'_q - z'_q at the label]

over labelled positions i, with p = softmax(z): gradient and Gauss-Newton matrix, at w = 0, of the summed
cross-entropy of z + Σ_q w_q z'_q. Ranks add up Q² + Q numbers, whatever the model.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Responses:
    """Sums of H and g over the labelled positions that `add` is given.

    Attributes:
        gram: H, float64 (Q, Q).
        slope: g, float64 (Q,).
        positions: labelled positions so far, float64.

    Args:
        matrix: M, float64 (branches, Q).
    """

    def __init__(self, matrix: Tensor) -> None:
        branches, count = matrix.shape
        centred = torch.cat([matrix.new_ones(branches, 1), matrix], dim=1)  # (branches, 1 + Q)
        self._solve = torch.linalg.pinv(centred)  # z and z' from the branches, (1 + Q, branches)
        self.gram = torch.zeros(count, count, dtype=torch.float64)
        self.slope = torch.zeros(count, dtype=torch.float64)
        self.positions = torch.zeros((), dtype=torch.float64)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Adds some positions.

        Args:
            logits: of all branches, (branches, k, words).
            labels: index of each position's label among the words, int64 (k,).
        """
        branches, k, words = logits.shape
        if not k:
            return
        wide = torch.promote_types(logits.dtype, torch.float32)
        solve = self._solve.to(logits.device, wide)
        found = (solve @ logits.to(wide).view(branches, -1)).view(-1, k, words)
        p, changes = found[0].softmax(dim=-1), found[1:]  # (k, words), (Q, k, words)
        means = (changes * p).sum(dim=-1).double()  # (Q, k)
        scaled = (changes * p.sqrt()).flatten(1).double()  # (Q, k * words)
        right = changes.gather(2, labels.expand(len(changes), k)[..., None])[
            ..., 0
        ].double()  # (Q, k)
        self.gram += (scaled @ scaled.t() - means @ means.t()).cpu()
        self.slope += (means - right).sum(dim=1).cpu()
        self.positions += k
