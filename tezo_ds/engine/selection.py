"""Selection of the parameters that train, with the reasons why others stay frozen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from tezo_ds.adapters.found import Adapters, adapters_of
from tezo_ds.auto.rank import auto_ranks
from tezo_ds.config import TezoConfig
from tezo_ds.directions.space import Matrix, Vector
from tezo_ds.errors import ConfigError
from tezo_ds.patterns import matching
from tezo_ds.sharding.base import Sharding
from tezo_ds.sharding.view import matrix_shape

VECTOR = "vectors (biases, norms); see train_vectors"
EXCLUDED = "left out by include or exclude"
NO_GRAD = "requires_grad is False"
BASE = "weights beside which an adapter trains"


@dataclass
class Selection:
    """Parameters that train, and counts of the frozen ones by reason."""

    matrices: list[Matrix] = field(default_factory=list)
    vectors: list[Vector] = field(default_factory=list)
    frozen: Counter[str] = field(default_factory=Counter)  # reason -> parameters
    trainable_numel: int = 0
    frozen_numel: int = 0
    adapters: Adapters = field(default_factory=Adapters)


def select(
    sharding: Sharding,
    config: TezoConfig,
    factors_dtype: torch.dtype | None = None,
    ranks: Mapping[str, int] | None = None,
) -> Selection:
    """Selects the parameters that train; tied ones go by the first of their names. No rank is above a
    matrix's min(m, n).

    Args:
        sharding: the model.
        config: what trains.
        factors_dtype: dtype to which an earlier run rounded its factors, to get the same ones; None: the
            dtype of the weights in a forward.
        ranks: rank of each matrix, as an earlier run chose them; None: as the config says, under `include:
            auto` of every matrix that may be chosen. All ranks of the world must call this function where
            `rank` is "auto".

    Raises:
        ConfigError: nothing trains, a pattern names layers that are not there, or `ranks` do not fit the
            model.
    """
    chosen, weights = Selection(), list(sharding.weights())
    parameters = [weight.name for weight in weights]
    chosen.adapters = adapters_of(config, sharding)
    chosen.vectors += chosen.adapters.vectors
    chosen.trainable_numel = chosen.adapters.numel
    included = set(ranks or parameters)
    if not config.chooses:
        included = matching(config.include, parameters)
    included -= matching(config.exclude, parameters, "exclude")
    for weight in weights:
        name, shape, dtype = weight.name, weight.shape, weight.dtype
        reason = _frozen_because(name in included, len(shape), weight.may_train, config)
        if reason:
            chosen.frozen[reason] += 1
            chosen.frozen_numel += shape.numel()
            continue
        chosen.trainable_numel += shape.numel()
        if len(shape) < 2:
            chosen.vectors.append(Vector(name, shape.numel(), dtype))
        else:
            rounding, of = factors_dtype or dtype, matrix_shape(shape)
            rank = 1 if config.rank == "auto" else config.rank
            if config.facts.rank is not None:  # directions of low rank, of a small table too
                rank = min(rank, *of)
            chosen.matrices.append(Matrix(name, of, rank, dtype, rounding))
    if config.rank == "auto" or (config.chooses and ranks):
        ranks = ranks or auto_ranks(
            sharding, chosen.matrices, config.rank_threshold, config.rank_max, config.seed
        )
        if odd := {matrix.name for matrix in chosen.matrices} ^ ranks.keys():
            raise ConfigError(
                f"ranks and model differ in {len(odd)} parameters, e.g. {min(odd)}; use the run's own "
                "model, include and exclude"
            )
        chosen.matrices = [replace(matrix, rank=ranks[matrix.name]) for matrix in chosen.matrices]
    _check(chosen, config)
    return chosen


def _frozen_because(
    included: bool, dims: int, requires_grad: bool, config: TezoConfig
) -> str | None:
    if dims < 2 and not config.train_vectors:
        return VECTOR
    if dims > 1 and config.adapter != "none":
        return BASE
    if not included:
        return EXCLUDED
    return None if requires_grad else NO_GRAD


def _check(chosen: Selection, config: TezoConfig) -> None:
    if not chosen.matrices and not chosen.vectors:
        raise ConfigError(
            f"no parameter trains: include {list(config.include)} without exclude "
            f"{list(config.exclude)} matches no matrix of the model; see model.named_parameters()"
        )
