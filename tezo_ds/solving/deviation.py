"""`normalize: std`: slopes in units of the spread of a step's losses (FZOO, arXiv 2506.09034; GRZO).

    central    σ² = 2 ρ² Σ κ² / (2n - 1)         of 2n losses, each about the middle of its pair
    forward    σ² = ρ² Σ (κ - κ̄)² / (n - 1)      of n losses, each less that of its centre: FZOO's σ

over the n directions that were measured. A step then moves against g / σ, whatever the loss's unit. Middles
and centres are left out, as those of examples, or of ranks' own batches, differ for reasons of their own.

σ is a function of κ and ρ, which the journal has; sums are rounded once (`fsum`), the same on any processor.
"""

from __future__ import annotations

import math

from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError


def deviation(kappa: Tensor, rho: float, central: bool) -> float:
    """Returns σ, in the loss's unit; 0 where fewer directions were measured than it takes.

    Args:
        kappa: float64 (Q,), NaN for directions that failed.
        rho: ρ.
        central: whether κ are of pairs, or of one loss and a centre.
    """
    found = [k for k in kappa.tolist() if math.isfinite(k)]
    largest = max(map(abs, found), default=0.0)
    freedom = 2 * len(found) - 1 if central else len(found) - 1
    if not largest or freedom < 1:
        return 0.0
    shares = [k / largest for k in found]  # whose squares do not overflow
    mean = 0.0 if central else math.fsum(shares) / len(shares)
    squares = math.fsum((share - mean) * (share - mean) for share in shares)
    return rho * largest * math.sqrt((2 if central else 1) * squares / freedom)


def scale_of(config: TezoConfig, kappa: Tensor, rho: float) -> float:
    """Returns the number that slopes are multiplied by: 1, or 1/σ under `normalize: std`. Where σ is 0, or
    has no reciprocal, 0: the step moves nothing.

    Raises:
        ConfigError: a step of a single forward difference, which has no σ.
    """
    if config.normalize == "none":
        return 1.0
    central = config.difference == "central"
    if len(kappa) < 2 and not central:
        raise ConfigError(
            "normalize std: one forward difference has no standard deviation; raise queries, or set "
            "difference to central"
        )
    sigma = deviation(kappa, rho, central)
    return 1 / sigma if sigma > 0 and math.isfinite(1 / sigma) else 0.0
