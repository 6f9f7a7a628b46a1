"""Gauss-Newton in the span of a step's directions.

    w = -shrink · (H/n + δ·mean(diag H)/n · I)⁻¹ g/n

with H and g of `responses` over n labelled positions. The decrease that is foreseen,
Δ = ½ gᵀ(…)⁻¹g / n, is partly that of noise: a direction that is fitted to n positions gains 1/2n on these and
loses as much on others. So what is left of D' = tr H(…)⁻¹ directions is Δ - D'/2n, and the step is shrunk by
its share of Δ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Solved:
    """A step's weights w of its directions.

    Attributes:
        weights: w, float64 (Q,); 0 for directions that failed.
        foreseen: Δ, decrease of the mean loss that the quadratic model foresees of a step that is not shrunk.
        shrink: what the step was multiplied by, in [0, 1].
    """

    weights: Tensor
    foreseen: float
    shrink: float


def solve(gram: Tensor, slope: Tensor, count: float, damping: float, biases: int = 0) -> Solved:
    """Solves for the weights of a step's directions.

    Args:
        gram: H, float64 (Q, Q), over all ranks.
        slope: g, float64 (Q,), over all ranks; a direction with a number that is not finite in either is left
            out.
        count: n, labelled positions over all ranks.
        damping: δ, over the mean of H's diagonal: of directions, and of biases, apart.
        biases: how many of the last columns are biases of words.
    """
    weights = torch.zeros_like(slope)
    fine = slope.isfinite() & gram.diagonal().isfinite()
    if not bool(fine.any()):
        return Solved(weights, 0.0, 0.0)
    H, g = gram[fine][:, fine] / count, slope[fine] / count
    ridge, first = torch.empty_like(g), int(fine[: len(fine) - biases].sum())
    for part in (slice(0, first), slice(first, None)):
        ridge[part] = damping * H.diagonal()[part].mean()
    inverse = torch.linalg.pinv(H + torch.diag(ridge), hermitian=True)
    step = inverse @ g
    foreseen = float(g @ step) / 2
    noise = float((inverse * H).sum()) / (2 * count)
    shrink = max(0.0, 1 - noise / foreseen) if foreseen > 0 else 0.0
    weights[fine] = -shrink * step
    return Solved(weights, foreseen, shrink)
