"""Runs of a sweep one after another in this process, on one loaded model while nothing writes its weights."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tezo_ds.config import TezoConfig
from tezo_ds.engine.engine import Engine
from tezo_ds.errors import ProbeError
from tezo_ds.files.text import read_json
from tezo_ds.run.folder import SUMMARY, TEST, VALIDATION
from tezo_ds.settings import RunOptions, Settings
from tezo_ds.sweeping.halving import Setting, Trial, better_half, by_setting
from tezo_ds.sweeping.results import Results
from tezo_ds.training import running
from tezo_ds.training.display import Display
from tezo_ds.training.session import Session, open_session

Asked = tuple[RunOptions, Settings, TezoConfig, "dict[str, Any] | None"]
Say = Callable[[str], None]


class Quiet(Display):
    """Display of warnings alone, each once."""

    said: set[str]

    def __init__(self, rank: int, world_size: int, log_every: int) -> None:
        super().__init__(1, world_size, log_every)
        self._first, self.said = rank == 0, set()

    def note(self, text: str) -> None:
        """Prints a warning."""
        if self._first and text.startswith("warning") and text not in self.said:
            print(text)
            self.said.add(text)


class Model:
    """A loaded model with its data, kept from run to run."""

    def __init__(self) -> None:
        self._of: tuple[Settings, Any] | None = None
        self._session: Session | None = None

    def session(self, asked: Asked, config: TezoConfig, ranks: dict[str, int] | None) -> Session:
        """Returns a session for a run: on the model that is loaded, if it is the run's and as it was."""
        options, settings, _, deepspeed = asked
        if self._session is None or self._of != (settings, deepspeed):
            self._session = None
            gc.collect()  # so that two models are never there
            opened = open_session(settings, config, deepspeed, ranks, batch_size=options.batch_size)
        else:
            opened = self._session.anew(config, options.batch_size, ranks)
        self._session, self._of = opened, (settings, deepspeed)
        return opened

    def give_up_if_spoilt(self) -> None:
        """Forgets the model if the run that has ended has changed more than its coefficients."""
        if self._session is not None and spoils(self._session.engine):
            self._session = None


def spoils(engine: Engine) -> bool:
    """Returns whether a run leaves anything in a model's weights or modules."""
    config = engine.config
    return (
        engine.method.writes
        or engine.probe.writes
        or config.refresh_every > 0
        or config.adapter != "none"
        or config.output_layer != "frozen"
        or config.compile
        or config.chooses
    )


class Sweep:
    """One sweep.

    Attributes:
        rungs: steps after which settings are compared.
        trials: the runs by what is compared.
        left: settings that were compared, by those steps.
        by: part of the examples whose loss decides.

    Args:
        trials: the runs.
        read: reads a run's arguments, as `tezo-ds train` would.
        folder: the sweep's folder.
        results: what was found so far.
        rungs: steps after which settings are compared.
        say: prints a line.
    """

    def __init__(
        self, trials: Sequence[Trial], read: Callable[[Trial, Path], Asked], folder: Path, results: Results,
        rungs: Sequence[int], say: Say,
    ) -> None:  # fmt: skip
        self._read, self._folder, self._results, self._say = read, folder, results, say
        self.rungs = rungs
        self.trials = by_setting(trials)
        self.left: dict[int, list[Setting]] = {}
        self.by = TEST
        self._model = Model()

    def __call__(self) -> bool:
        """Makes the runs that are missing; returns whether all were made, and none was stopped by SIGTERM.
        All ranks must call this."""
        left = list(self.trials)
        for rung in self.rungs:
            self.left[rung] = left
            for setting in left:
                for trial in self.trials[setting]:
                    if not self._run(trial, rung):
                        return False
            left = better_half({setting: self.losses(setting, rung) for setting in left})
        return True

    def losses(self, setting: Setting, rung: int) -> list[float | None]:
        """Returns the losses of a setting's seeds after some steps."""
        return self._results.losses([trial.name for trial in self.trials[setting]], rung)

    def accuracies(self, setting: Setting, rung: int) -> list[float]:
        """Returns the accuracies of a setting's seeds, where they were measured."""
        scores = [self._results.of(trial.name, rung) or {} for trial in self.trials[setting]]
        return [score["accuracy"] for score in scores if score.get("accuracy") is not None]

    def _run(self, trial: Trial, steps: int) -> bool:
        """Brings a run to so many steps, unless it was there; returns whether it came to them."""
        known = self._results.of(trial.name, steps)
        if known is None:
            asked = self._read(trial, self._folder / trial.name)
            options = asked[0].model_copy(update={"steps": steps, "resume": None})
            made = (options, *asked[1:])
            try:
                summary = running.run(
                    *made, lambda config, ranks: self._model.session(made, config, ranks), Quiet
                )
            except ProbeError as error:
                known = {"loss": None, "by": None, "failed": str(error)}
            else:
                known = _score(summary, options.output)
                if known is None:
                    return False
            finally:
                self._model.give_up_if_spoilt()
            self._results.add(trial.name, steps, known)
            self._say(f"{trial.name}: {_told(known)} after {steps} steps")
        self.by = known.get("by") or self.by
        return True


def _score(summary: dict[str, Any] | None, folder: Path) -> dict[str, Any] | None:
    """Returns what a run is judged by; None where it was stopped."""
    if summary is None:  # finished by a process that did not live to keep its score
        summary = read_json(folder / SUMMARY)
    if summary["status"] != "finished":
        return None
    by = VALIDATION if "validation_loss_after" in summary else TEST
    accuracy = "accuracy_after" if by == TEST else "validation_accuracy_after"
    return {
        "loss": summary.get(f"{by}_loss_after"), "accuracy": summary.get(accuracy), "by": by,
        "seconds": summary["seconds"],
    }  # fmt: skip


def _told(score: dict[str, Any]) -> str:
    loss = score["loss"]
    if loss is None or not math.isfinite(loss):
        return f"failed ({score.get('failed', 'its loss is not finite')})"
    accuracy = score.get("accuracy")
    return f"{score['by']} loss {loss:.4f}" + (
        f", accuracy {accuracy:.1%}" if accuracy is not None else ""
    )
