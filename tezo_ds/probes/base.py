"""Base of all probes: losses at W + Δ_b, for many b."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.directions.branches import Branches
from tezo_ds.directions.lowrank import Factors
from tezo_ds.sharding.base import Sharding
from tezo_ds.trunk.trunk import Trunk

Losses = Callable[[Mapping[str, Any], int], Tensor]  # an objective: (batch, branches) -> sums


class Probe(ABC):
    """Measurement of losses at W + Δ.

    Attributes:
        name: value of the config's `probe`.
        writes: whether shards are written for the time of a forward, a branch at a time.
        copies: whether written shards are restored from copies, to the bit.
        trunk: splits the objective's forwards; None: they are whole.
    """

    name: ClassVar[str]
    writes: ClassVar[bool] = False
    copies = False
    trunk: Trunk | None = None

    @classmethod
    @abstractmethod
    def gaps(
        cls, sharding: Sharding, names: Collection[str], factors: Factors | None
    ) -> dict[str, str]:
        """Returns the parameters out of the probe's reach, each with the reason.

        Args:
            sharding: the model.
            names: names of all parameters that train.
            factors: factors of the directions; None if directions are dense.
        """

    @classmethod
    @abstractmethod
    def make(
        cls, config: TezoConfig, sharding: Sharding, names: Collection[str], factors: Factors | None
    ) -> Probe:
        """Makes a probe of a model that has no gaps.

        Raises:
            ShardingError: the weights' sharding does not allow it.
        """

    @abstractmethod
    def measure(self, objective: Losses, batch: Mapping[str, Any], branches: Branches) -> Tensor:
        """Returns loss sums and counts at each branch: float64 (2, branches)."""

    @abstractmethod
    def held(self, branches: Branches) -> AbstractContextManager[None]:
        """Context manager: plain forwards inside see the weights at the only branch."""

    def seat(self, rows: Tensor | None) -> None:  # noqa: B027  # nothing, where a forward is of one branch
        """Has row i of later forwards see branch rows[i], int64 (k,); None: rows are branch-major again."""

    def exactly(self) -> AbstractContextManager[None]:
        """Context manager: measuring inside leaves the weights as they were, to the bit."""
        return nullcontext()

    def retrace(self, branches: Branches) -> None:  # noqa: B027  # nothing, of a probe that only reads
        """Leaves the weights as `measure` would, without forwards."""
