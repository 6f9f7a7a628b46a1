"""How perturbed losses are measured."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from tezo_ds.errors import ProbeError
from tezo_ds.factors import CoefficientSpace
from tezo_ds.objective import Objective
from tezo_ds.probes.fused import FusedProbe
from tezo_ds.probes.inplace import InplaceProbe
from tezo_ds.probes.sites import kind_of, uncovered, users
from tezo_ds.sharding.base import Sharding

__all__ = ["FusedProbe", "InplaceProbe", "Probe", "make_probe"]

log = logging.getLogger(__name__)


class Probe(Protocol):
    """Measures losses at W₀ + U diag(c) Vᵀ."""

    name: str

    def measure(self, objective: Objective, batch: Mapping[str, Any], c: Tensor) -> Tensor:
        """Loss sums and counts, float64 (2, branches), at each row of c, (branches, D) float64."""

    def held(self, c: Tensor) -> AbstractContextManager[None]:
        """Within it, plain forwards see the weights at c, (D,)."""


def make_probe(choice: str, sharding: Sharding, space: CoefficientSpace) -> Probe:
    """The probe that `choice` (auto, fused, inplace) names.

    Raises:
        ProbeError: fused where a trainable parameter is out of its reach.
        ShardingError: in-place on weights that cannot be written exactly.
    """
    names = {matrix.name for matrix in space.matrices}
    gaps = {**_split_embeddings(sharding, space), **uncovered(sharding.module, names)}
    if choice == "fused" and gaps:
        raise ProbeError(f"fused probe cannot reach {_listed(gaps)}; exclude it or use inplace")
    if choice == "auto" and gaps:
        log.warning("probe: inplace, since fused cannot reach %s", _listed(gaps))
    if choice == "inplace" or gaps:
        return InplaceProbe(sharding, space)
    return FusedProbe(sharding, space)


def _split_embeddings(sharding: Sharding, space: CoefficientSpace) -> dict[str, str]:
    """A rank looks up nothing for the words of the others, in ways of torch's own."""
    parameters = dict(sharding.module.named_parameters())
    shapes = {matrix.name: matrix.shape for matrix in space.matrices}
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
