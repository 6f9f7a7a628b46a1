"""Responses of logits or losses along a step's directions, and their Gram matrix, for Gauss-Newton.

    z_b = z + Σ_q M_bq z'_q                 logits of branch b, M = ±ρ of each direction in each branch
    H_qr = Σ_i [Σ_v p_v z'_q z'_r - (Σ_v p_v z'_q)(Σ_v p_v z'_r)]
    g_q = Σ_i [Σ_v p_v z'_q - z'_q at the label]

over labelled positions i, with p = softmax(z): gradient and Gauss-Newton matrix, at w = 0, of the summed
cross-entropy of z + Σ_q w_q z'_q. A bias of a word is a direction whose response is 1 at that word and 0 at
the others. Of losses ℓ_i alone (those of a `loss_fn`) there is the empirical Fisher matrix,

    ℓ_bi = ℓ_i + Σ_q M_bq κ_iq,    H_qr = Σ_i κ_iq κ_ir,    g_q = Σ_i κ_iq

Ranks add up Q² + Q numbers, whatever the model.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _solver(matrix: Tensor) -> Tensor:
    """Returns what takes branches' values to (z, z'_0, …), float64 (1 + Q, branches)."""
    centred = torch.cat([matrix.new_ones(len(matrix), 1), matrix], dim=1)
    return torch.linalg.pinv(centred)


class Responses:
    """Sums of H and g over the labelled positions that `add` is given.

    Attributes:
        gram: H, float64 (Q + C, Q + C), directions before biases.
        slope: g, float64 (Q + C,).
        positions: labelled positions so far, float64.

    Args:
        matrix: M, float64 (branches, Q).
        biases: C, words that have a bias: all that `add` shows, or none.
    """

    def __init__(self, matrix: Tensor, biases: int = 0) -> None:
        self._solve, self._biases = _solver(matrix), biases
        count = matrix.shape[1] + biases
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
        if self._biases:
            ones = torch.eye(words, dtype=wide, device=logits.device)[:, None]  # (words, 1, words)
            changes = torch.cat([changes, ones.expand(-1, k, -1)])  # (Q + C, k, words)
        means = (changes * p).sum(dim=-1).double()  # (Q + C, k)
        scaled = (changes * p.sqrt()).flatten(1).double()  # (Q + C, k * words)
        labels = labels.expand(len(changes), k)[..., None]
        right = changes.gather(2, labels)[..., 0].double()  # (Q + C, k)
        self.gram += (scaled @ scaled.t() - means @ means.t()).cpu()
        self.slope += (means - right).sum(dim=1).cpu()
        self.positions += k


class LossResponses:
    """Sums of the empirical Fisher matrix and of g over the examples that `add` is given.

    Attributes:
        gram: H, float64 (Q, Q).
        slope: g, float64 (Q,).
        positions: sum of the examples' counts so far, float64.

    Args:
        matrix: M, float64 (branches, Q).
    """

    def __init__(self, matrix: Tensor) -> None:
        self._solve, count = _solver(matrix), matrix.shape[1]
        self.gram = torch.zeros(count, count, dtype=torch.float64)
        self.slope = torch.zeros(count, dtype=torch.float64)
        self.positions = torch.zeros((), dtype=torch.float64)

    def add(self, losses: Tensor, counts: Tensor) -> None:
        """Adds some examples.

        Args:
            losses: loss sums of all branches, float64 (branches, examples).
            counts: what each example counts, float64 (examples,).
        """
        kappa = (self._solve @ losses.cpu())[1:]  # (Q, examples)
        self.gram += kappa @ kappa.t()
        self.slope += kappa.sum(dim=1)
        self.positions += counts.sum().cpu()
