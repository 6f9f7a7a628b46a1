"""What is said of a run's steps while they are made: a loss that diverges, steps that teach nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tezo_ds.engine.report import StepReport
from tezo_ds.losses.objective import Objective
from tezo_ds.training.divergence import Divergence
from tezo_ds.training.stalls import Stalls
from tezo_ds.training.ties import Ties


class Watches:
    """All watches over a run's steps; the same on all ranks.

    Args:
        made: lines of the journal of a resumed run's steps.
        objective: of the run.
        stops: whether a loss far above its start ends the run.
    """

    def __init__(
        self, made: Sequence[Mapping[str, Any]], objective: Objective, stops: bool
    ) -> None:
        self._objective = objective
        self._divergence = Divergence([line["loss"] for line in made], stops)
        self._ties = Ties(line["kappa"] for line in made)
        self._stalls = Stalls(line["solved"] for line in made if "solved" in line)

    def step(self, report: StepReport) -> list[str]:
        """Takes in a step; returns warnings.

        Raises:
            ProbeError: the loss is far above its start, and that ends the run.
        """
        gain, found = self._objective.gain, []
        if gain is None:
            found.append(self._divergence.step(report.loss, report.step))
        if self._objective.piecewise_constant:
            found.append(self._ties.step(report.tied, gain or "loss"))
        if report.solved is not None:
            found.append(self._stalls.step(report.solved))
        return [warning for warning in found if warning is not None]
