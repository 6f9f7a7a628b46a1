"""What one step found, for whoever watches a run."""

from __future__ import annotations

from dataclasses import dataclass

from tezo_ds.engine.slopes import Quality


@dataclass(frozen=True)
class StepReport:
    """What one step measured.

    Attributes:
        step: counted from 0.
        loss: mean over branches of the loss over all ranks.
        kappa: slope along each direction as it was measured, in loss per unit of ρ.
        rho: ρ of the step.
        lr: learning rate of the step.
        seconds: wall-clock of the step on this rank.
        tokens: of this rank's batch (its attention mask's sum), counted once whatever the branches.
        dropped: directions that failed, as a loss of theirs was not finite; their κ is NaN.
        quality: what the slopes say of the gradient.
        stopping: a rank had been asked to stop (`Engine.ask_to_stop`); the same on every rank.
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
