"""Report of one step, for whoever watches a run."""

from __future__ import annotations

from dataclasses import dataclass

from tezo_ds.engine.slopes import Quality


@dataclass(frozen=True)
class StepReport:
    """Measurements of one step.

    Attributes:
        step: counted from 0.
        loss: mean over branches of the loss over all ranks.
        kappa: slope along each direction as it was measured, in loss per unit of ρ.
        rho: ρ of the step.
        lr: learning rate of the step.
        seconds: wall-clock of the step on this rank.
        tokens: tokens of this rank's batch (its attention mask's sum), counted once whatever the branches.
        dropped: number of directions that failed, as a loss was not finite; their κ is NaN.
        quality: quality of the slopes as an estimate of the gradient.
        solved: what the step descends by along each direction, in place of κ over their number; None in
            methods that solve for nothing.
        rewards: what each branch gained, minus its loss, over all ranks, NaN where it failed; None where
            losses are measured.
        stopping: whether a rank had been asked to stop (`Engine.ask_to_stop`); the same on every rank.
    """

    step: int
    loss: float
    kappa: tuple[float, ...]
    rho: float
    lr: float
    seconds: float
    tokens: int
    dropped: int
    quality: Quality
    stopping: bool = False
    solved: tuple[float, ...] | None = None
    rewards: tuple[float, ...] | None = None

    @property
    def tied(self) -> bool:
        """Whether all branches gave the same, so that nothing was learnt."""
        return not any(self.kappa)
