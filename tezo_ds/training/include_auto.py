"""`include: auto`: a run measures all matrices before its first step, and trains those that gain most.

What is chosen goes into config.json, as the ranks under `rank: auto` do, so whoever opens the run again takes
the same matrices and measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.probing_layers.files import write
from tezo_ds.probing_layers.report import Found, sentence
from tezo_ds.run.folder import RunFolder
from tezo_ds.run.terms import save_term
from tezo_ds.settings import RunOptions
from tezo_ds.tasks.encoded import Encoded
from tezo_ds.training.display import Display
from tezo_ds.training.layers_probe import Wanted, probe_layers
from tezo_ds.training.output_layer import OutputLayerFits
from tezo_ds.training.session import Session

EXAMPLES, COLUMNS = 256, 1  # the command's defaults


@dataclass(frozen=True)
class Choice:
    """A choice that was just made; empty where none was.

    Attributes:
        found: what was measured.
        fit: what the summary says of the fit of the output layer that came before.
        term: the term that was fitted.
    """

    found: Found | None = None
    fit: dict[str, Any] | None = None
    term: dict[str, Tensor] = field(default_factory=dict)

    @property
    def fitted(self) -> int | None:
        """Number of steps before the fit, 0; None where there was no fit."""
        return 0 if self.term else None

    def leave(self, folder: RunFolder | None, display: Display) -> None:
        """Writes what was measured, and the term, into the run's folder; `folder` is rank 0's."""
        if self.found is None or folder is None:
            return
        if self.term:
            save_term(folder, 0, self.term)
        for problem in write(self.found, folder.path):
            display.note(problem)


def to_measure(config: TezoConfig) -> TezoConfig:
    """Returns the config of the engine that measures: without a cache, as there is no trunk while everything
    might train."""
    return config.model_copy(update={"trunk_cache": "off"})


def choose_matrices(
    session: Session, examples: Sequence[Encoded], options: RunOptions, trunk_cache: str, display: Display
) -> Choice:  # fmt: skip
    """Chooses what trains, and gives the session an engine of it; of everything, with a warning, where no
    set's gain is clear of noise. All ranks must call this.

    Args:
        session: a session whose engine trains all matrices that may be chosen.
        examples: the training examples.
        options: the run's options.
        trunk_cache: the run's, which the session's engine does without.
        display: receiver of notices and progress.

    Raises:
        TezoError: see `probe_layers`.
    """
    fits = OutputLayerFits(session, examples, None, display, options.batch_size)
    fits.fit_if_due()
    engine = session.engine
    wanted = Wanted(EXAMPLES, COLUMNS, None, options.batch_size, options.steps)
    found = probe_layers(session, examples, wanted, display)
    chosen = found.chosen
    if chosen is None:
        chosen = found.sets[-1]  # which is everything
        display.note(
            f"warning: include auto: {sentence(found)}; all {found.matrices} matrices train"
        )
    else:
        display.note(f"include auto: {sentence(found)}")
    names = set(chosen.names)
    ranks = {m.name: m.rank for m in engine.space.matrices if m.name in names}
    term = engine.output_layer.state
    session.train_only(ranks, engine.config.model_copy(update={"trunk_cache": trunk_cache}))
    display.summary(session.engine)
    return Choice(found, fits.found, term)
