"""Slopes from losses: failed directions are left out, outliers may be clipped, quality is estimated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PATIENCE = 5  # steps in a row with directions that failed before a run stops
WINDOW = 256  # slopes that the clipping quantile is of
ENOUGH = 16  # of them before anything is clipped


def slopes_of(kappa: Tensor) -> Tensor:
    """Returns the weight of each direction, float64 (Q,): κ over the number of directions measured, 0 for
    directions that failed."""
    measured = kappa.isfinite()
    return torch.where(measured, kappa, 0.0) / max(1, int(measured.sum()))


def clip(kappa: Tensor, quantile: float | None, window: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds |κ| by a quantile of the last steps' |κ|, taken before any bound.

    Args:
        kappa: float64 (Q,), NaN for directions that failed.
        quantile: in (0, 1); None bounds nothing.
        window: |κ| of the last steps.

    Returns:
        κ, each |κ| at most the bound, and the window with this step in it.
    """
    if quantile is None:
        return kappa, window
    longer = torch.cat([window, kappa[kappa.isfinite()].abs()])[-WINDOW:]
    if len(window) < ENOUGH:
        return kappa, longer
    bound = torch.quantile(window, quantile).item()
    return kappa.clamp(-bound, bound), longer


@dataclass(frozen=True)
class Quality:
    """Quality of a step's slopes as an estimate of the gradient of the coefficients.

    Attributes:
        mean, spread: mean and standard deviation of κ over measured directions; None of fewer than one
            or two.
        gradient_norm: ‖∇‖ in what directions are N(0, 1) in (TeZO's coefficients a, LOZO's U, MeZO's
            weights): the root of the mean of κ², as κ = ⟨∇, τ⟩.
        snr: ‖∇‖² over the mean square error of the step's estimate Σκτ/Q, from how far directions
            agree; None of fewer than two, and where no such sum is made (LOZO, MeZO).
    """

    mean: float | None
    spread: float | None
    gradient_norm: float | None
    snr: float | None


def quality(kappa: Tensor, gradient: Tensor | None) -> Quality:
    """Returns the quality of a step's slopes.

    Args:
        kappa: float64 (Q,), NaN for directions that failed.
        gradient: g = Σκτ/Q, float64 (D,); None if directions are not τ.
    """
    measured = kappa[kappa.isfinite()]
    if not len(measured):
        return Quality(None, None, None, None)
    mean, norm = measured.mean().item(), measured.square().mean().sqrt().item()
    if len(measured) < 2:
        return Quality(mean, None, norm, None)
    snr = None if gradient is None else _snr(measured, gradient)
    return Quality(mean, measured.std().item(), norm, snr)


def _snr(kappa: Tensor, gradient: Tensor) -> float | None:
    """SNR by ‖Σκτ‖² = Σκ²‖τ‖² + terms of pairs of directions, of mean ‖∇‖² a pair; ‖τ‖² is about D."""
    count = len(kappa)
    alone = kappa.square().sum().item() * len(gradient)
    shared = (count**2 * gradient.square().sum().item() - alone) / (count * (count - 1))
    error = max(alone / count - shared, 0.0) / count
    return max(shared, 0.0) / error if error else None
