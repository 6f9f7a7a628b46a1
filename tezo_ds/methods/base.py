"""Base of all methods: branches to measure, and an update from their slopes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tezo_ds.directions.branches import Ask, Branches
from tezo_ds.directions.lowrank import Factors
from tezo_ds.directions.space import CoefficientSpace, Packed
from tezo_ds.errors import StorageError
from tezo_ds.methods.descent import Descent
from tezo_ds.sharding.view import ShardView

Write = Callable[[ShardView], None]  # changes a shard that this rank holds


class Method(ABC):
    """The mathematics of a run: all state is a function of the slopes so far, and the same on every rank.

    What a step changes is kept aside as coefficients, float64 and exact, where the method allows; the
    rest goes into the weights by a `Write`, which the caller applies to every shard.

    Attributes:
        coefficients: a, float64 (D,) on the CPU; zero where the weights hold the change.
        finished: a of each period before this one, (D,), where a method has periods of coefficients.
        factors: factors of low-rank directions; None if directions are dense.
        writes: whether a step may write weights.
        in_tau: whether directions are τ of all coefficients, and not of those of vectors alone.
    """

    factors: Factors | None = None
    writes = False
    in_tau = True

    def __init__(self, space: CoefficientSpace) -> None:
        self.space = space
        self.coefficients = torch.zeros(space.numel, dtype=torch.float64)
        self.finished: list[Tensor] = []

    @property
    def period(self) -> int:
        """Number of periods of U and V, or of V, before this one."""
        return 0 if self.factors is None else self.factors.period

    @property
    def recalled(self) -> tuple[int, ...]:
        """Numbers of directions that the method asks for beside those that are drawn."""
        return ()

    @property
    def state(self) -> dict[str, Packed]:
        """Every number that the next step depends on and that is equal on all ranks, by name."""
        return {"coefficients": self.space.pack(self.coefficients)}

    def begin(self, step: int) -> Write | None:
        """Begins a step; the result has to be applied before the step's branches are asked for."""
        return None

    def refresh(self) -> Write | None:
        """Ends a period of coefficients, in methods whose factors are fixed for a period; the result is as of
        `begin`."""
        raise NotImplementedError(f"{type(self).__name__} has no periods of coefficients")

    @abstractmethod
    def branches(self, ask: Ask) -> Branches:
        """Returns Δ = (change kept aside) + ρ · sign · Z_q for each branch that is asked for."""

    def along(self, changes: Tensor) -> Branches:
        """Returns branches (change kept aside) + each of some changes of the coefficients, float64 (k, D), in
        methods whose directions are fixed factors."""
        raise NotImplementedError(f"{type(self).__name__} has no fixed factors")

    @abstractmethod
    def kept_aside(self) -> Branches:
        """Returns one branch: the change that is not in the weights."""

    @abstractmethod
    def update(self, step: int, slopes: Tensor, gradient: Tensor, lr: float) -> Write | None:
        """Takes one step along Σ slope_q Z_q.

        Args:
            step: the step whose directions were measured.
            slopes: float64 (Q,) on the CPU: κ = (L⁺ - L⁻) / 2ρ of each direction over their number, so
                that the sum is a mean; 0 for a direction that failed.
            gradient: Σ slope_q τ_q, float64 (D,).
            lr: η of this step.
        """

    def merged(self) -> None:
        """Forgets the change kept aside, as the weights hold it now."""
        self.coefficients.zero_()

    def moments(self, view: ShardView) -> dict[str, Tensor]:
        """Returns moments kept beside a shard of this rank, by kind: (view.numel,), a number for each
        element of the shard, float32 or wider. {} before the first update, and for most methods."""
        return {}

    def set_moments(self, view: ShardView, moments: Mapping[str, Tensor]) -> None:
        """Replaces the moments kept beside a shard by some that `moments` gave.

        Raises:
            StorageError: the method keeps other kinds.
        """
        if moments:
            raise StorageError(
                f"{view.name}: there are moments ({', '.join(moments)}) beside its shards, and the run's "
                "method keeps none there; use the method that they are of"
            )

    def offsets(self, ask: Ask) -> Tensor:
        """Returns ±ρτ of each branch: float64 (branches, D); zeros if no τ counts."""
        if not self.in_tau and not self.space.vectors:
            return torch.zeros(len(ask), self.space.numel, dtype=torch.float64)
        return ask.times(self.space.taus(ask.step, ask.directions))

    def move_vectors(self, change: Tensor, lr: float) -> None:
        """Moves a ← a - η · change on the coefficients of vectors alone; change is (D,)."""
        vectors = self.space.of_vectors
        self.coefficients[vectors] -= lr * change[vectors]

    def moments_of_vectors(self, descent: Descent) -> dict[str, Packed]:
        """Returns, by name, the state of a descent of (D,) coefficients, where only vectors' count."""
        return {f"vector_{name}": self.space.pack(t) for name, t in descent.state.items()}
