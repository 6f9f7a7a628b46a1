"""How perturbed losses are measured."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.directions.branches import Branches
from tezo_ds.directions.lowrank import Factors
from tezo_ds.errors import ProbeError
from tezo_ds.losses.objective import Objective
from tezo_ds.models.structure import kind_of, uncovered, users
from tezo_ds.probes.fused import FusedProbe
from tezo_ds.probes.inplace import InplaceProbe
from tezo_ds.probes.vectors import uncovered_vectors
from tezo_ds.sharding.base import Sharding

__all__ = ["FusedProbe", "InplaceProbe", "Probe", "make_probe"]

log = logging.getLogger(__name__)


class Probe(Protocol):
    """Measures losses at W + Δ."""

    name: str

    def measure(self, objective: Objective, batch: Mapping[str, Any], branches: Branches) -> Tensor:
        """Loss sums and counts, float64 (2, branches), at each branch."""

    def held(self, branches: Branches) -> AbstractContextManager[None]:
        """Within it, plain forwards see the weights at the one branch there is."""


def make_probe(
    config: TezoConfig, sharding: Sharding, names: Collection[str], factors: Factors | None
) -> Probe:
    """The probe that `config.probe` (auto, fused, inplace) names.

    Args:
        config: of the run.
        sharding: the model.
        names: of all parameters that train.
        factors: of the directions; None if they are dense.

    Raises:
        ProbeError: fused where directions are dense, or a trainable parameter is out of its reach.
        ShardingError: in-place on weights that cannot be written exactly.
    """
    if factors is not None and fused_serves(config, sharding, names, factors):
        return FusedProbe(sharding, factors)
    if factors is None and config.probe == "fused":
        raise ProbeError(f"fused probe: directions of {config.method} are dense; use inplace")
    if factors is not None:
        factors.keep = True
    return InplaceProbe(sharding, names, keeps_copies(config, factors))


def fused_serves(
    config: TezoConfig, sharding: Sharding, names: Collection[str], factors: Factors
) -> bool:
    """Whether the fused probe is asked for and reaches all that trains; see `make_probe`.

    Raises:
        ProbeError: it is to be used and does not.
    """
    if config.probe == "inplace":
        return False
    gaps = {
        **_split_embeddings(sharding, factors),
        **uncovered(sharding.module, set(factors.matrices)),
        **uncovered_vectors(sharding, set(names) - set(factors.matrices)),
    }
    if gaps and config.probe == "fused":
        raise ProbeError(f"fused probe cannot reach {_listed(gaps)}; exclude it or use inplace")
    if gaps:
        log.warning("probe: inplace, since fused cannot reach %s", _listed(gaps))
    return not gaps


def keeps_copies(config: TezoConfig, factors: Factors | None) -> bool:
    """Whether the in-place probe restores trained weights from copies."""
    return factors is not None if config.restore == "auto" else config.restore == "copy"


def _split_embeddings(sharding: Sharding, factors: Factors) -> dict[str, str]:
    """A rank looks up nothing for the words of the others, in ways of torch's own."""
    parameters = dict(sharding.module.named_parameters())
    shapes = {name: matrix.shape for name, matrix in factors.matrices.items()}
    return {
        name: "Embedding split by tensor parallelism"
        for name, owner, _ in users(sharding.module, set(shapes))
        if kind_of(owner) == "embedding"
        if not sharding.block(parameters[name]).covers(shapes[name])
    }


def _listed(gaps: dict[str, str]) -> str:
    shown = [f"{name} ({why})" for name, why in list(gaps.items())[:3]]
    more = len(gaps) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
