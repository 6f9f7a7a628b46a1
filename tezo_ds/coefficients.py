"""Coefficients by parameter name, as they are saved and loaded: of one period, or of several."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tezo_ds.errors import ConfigError
from tezo_ds.factors import CoefficientSpace


def by_name(space: CoefficientSpace, rows: Tensor) -> dict[str, Tensor]:
    """Copies of the parts of (periods, D): of a matrix its a, (rank,) or, of several periods, (periods,
    rank); of a vector its change so far, (numel,)."""
    last = {vector.name for vector in space.vectors} if len(rows) > 1 else space.slices.keys()
    return {
        name: (part[-1] if name in last else part).clone()
        for name, part in space.split(rows).items()
    }


def as_rows(space: CoefficientSpace, coefficients: Mapping[str, Tensor]) -> Tensor:
    """The other way: float64 (periods, D), in which vectors are in the last row alone.

    Raises:
        ConfigError: names, ranks or periods are not those of the space or of each other.
    """
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
