"""Which parameters train, which stay frozen and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch

from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError
from tezo_ds.factors import Matrix, matrix_shape
from tezo_ds.sharding.base import Sharding

VECTOR = "vectors (biases, norms)"
EXCLUDED = "left out by include or exclude"
NO_GRAD = "requires_grad is False"


@dataclass
class Selection:
    """The outcome: matrices that train, and counts of what is frozen by reason."""

    matrices: list[Matrix] = field(default_factory=list)
    frozen: Counter[str] = field(default_factory=Counter)  # reason -> parameters
    trainable_numel: int = 0
    frozen_numel: int = 0

    @property
    def coefficients(self) -> int:
        """D, the numbers that are learnt."""
        return sum(matrix.rank for matrix in self.matrices)


def select(
    sharding: Sharding, config: TezoConfig, factors_dtype: torch.dtype | None = None
) -> Selection:
    """Goes through the model's parameters once, tied ones by the first of their names.

    Args:
        sharding: the model.
        config: what trains.
        factors_dtype: to which an earlier run rounded its factors, if these are to be the same; None:
            the dtype of the weights in a forward.

    Raises:
        ConfigError: nothing trains, or `rank` is above min(m, n) of a matrix.
    """
    chosen = Selection()
    for name, parameter in sharding.module.named_parameters():
        shape = sharding.shape(parameter)
        reason = _frozen_because(name, len(shape), parameter.requires_grad, config)
        if reason:
            chosen.frozen[reason] += 1
            chosen.frozen_numel += shape.numel()
        else:
            dtype = sharding.compute_dtype(parameter)
            matrix = Matrix(name, matrix_shape(shape), config.rank, dtype, factors_dtype or dtype)
            chosen.matrices.append(matrix)
            chosen.trainable_numel += shape.numel()
    _check(chosen.matrices, config)
    return chosen


def _frozen_because(name: str, dims: int, requires_grad: bool, config: TezoConfig) -> str | None:
    if dims < 2:
        return VECTOR
    if not _matches(name, config.include) or _matches(name, config.exclude):
        return EXCLUDED
    return None if requires_grad else NO_GRAD


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check(matrices: list[Matrix], config: TezoConfig) -> None:
    if not matrices:
        raise ConfigError(
            f"no parameter trains: include {list(config.include)} without exclude "
            f"{list(config.exclude)} matches no matrix of the model; see model.named_parameters()"
        )
    small = [matrix for matrix in matrices if matrix.rank > min(matrix.shape)]
    if small:
        first = small[0]
        raise ConfigError(
            f"rank {first.rank} is above min(m, n) = {min(first.shape)} of {first.name} "
            f"{first.shape} ({len(small)} such); lower rank, or add e.g. {first.name!r} to exclude"
        )
