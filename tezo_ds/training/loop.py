"""The loop of `tezo-ds train`: batches, steps, evaluations, and a run folder that is always whole."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tezo_ds.engine.report import StepReport
from tezo_ds.errors import StorageError
from tezo_ds.export.merged import save_merged
from tezo_ds.export.output_layer import not_in_merged
from tezo_ds.models.loading import load_tokenizer
from tezo_ds.run.card import model_card
from tezo_ds.run.folder import JOURNAL, MODEL, RunFolder
from tezo_ds.run.resuming import snapshot
from tezo_ds.settings import RunOptions
from tezo_ds.tasks.baselines import majority_accuracy
from tezo_ds.tasks.encoded import Encoded
from tezo_ds.training.best import Best
from tezo_ds.training.display import Display
from tezo_ds.training.evaluations import Evaluations, Scores
from tezo_ds.training.interrupts import Interrupted, deaf, turned_into_exceptions
from tezo_ds.training.liveness import Liveness
from tezo_ds.training.output_layer import OutputLayerFits
from tezo_ds.training.records import of_journal, write_results
from tezo_ds.training.samples import Samples
from tezo_ds.training.session import Session
from tezo_ds.training.step_batches import Padding, StepBatches
from tezo_ds.training.trackers import Trackers
from tezo_ds.training.trunk_caches import open_caches
from tezo_ds.training.watches import Watches

REPLAYED = f"the steps so far from {JOURNAL} in the run folder"


def train(
    session: Session,
    options: RunOptions,
    examples: Sequence[Encoded],
    folder: RunFolder | None,
    display: Display,
    scores: Scores | None = None,
    made: Sequence[Mapping[str, Any]] = (),
    base: str | None = None,
    fitted: int | None = None,
    fit: dict[str, Any] | None = None,
    best: Best | None = None,
) -> dict[str, Any]:
    """Trains from the engine's next step on. Every rank calls this; `folder` is rank 0's, None elsewhere.

    On an error or a signal rank 0 still writes coefficients, adapter, curve and summary as of the
    last whole step, which takes no other rank. The merged model, which takes all, is then not written;
    what a method put into the weights can be replayed from the journal. A SIGTERM on any rank ends the
    run in the same way after the step that all are in, without its last evaluation.

    Args:
        scores: lines of a resumed run's evaluations, by part and by the steps before them.
        made: lines of the journal of a resumed run's steps.
        base: fingerprint of the base model's weights.
        fitted: steps before the fit of the output layer that a resumed run goes on with.
        fit: what is known of that fit.
        best: what is done with the best evaluation; None: nothing.

    Returns:
        The summary, as in summary.json.

    Raises:
        TezoError: the engine's errors. Interrupted: a signal came.
    """
    watches = Watches(made, session.engine.objective, options.stop_on_divergence)
    with Trackers(options.report_to, folder, display) as trackers:
        evaluations = Evaluations(session, options, folder, display, scores or {}, best, trackers)
        training = _Training(
            session, options, examples, folder, display, watches, evaluations, trackers
        )
        training.count_padding(made)
        training.base = base
        training.fits.go_on(fitted, fit)
        return training.run()


class _Training:
    """One call of `train`, with its arguments."""

    def __init__(
        self, session: Session, options: RunOptions, examples: Sequence[Encoded], folder: RunFolder | None,
        display: Display, watches: Watches, evaluations: Evaluations, trackers: Trackers,
    ) -> None:  # fmt: skip
        self._session, self._options, self._examples = session, options, examples
        self._folder, self._display, self._trackers = folder, display, trackers
        self._engine, self._watches, self._evaluations = session.engine, watches, evaluations
        self._samples = Samples(session, examples, folder, display, options.samples_every)
        engine = session.engine
        self.base: str | None = None
        self._batch = StepBatches(session, examples, options.batch_size)
        self._padding = Padding()
        self.fits = OutputLayerFits(session, examples, folder, display, options.batch_size)
        # Without a token to pad with, unlike the session's. Here, as rank 0 alone writes the adapter.
        asked = session.settings
        self._tokenizer = load_tokenizer(asked.model, pad=False, trust=asked.trust_remote_code)
        self._logged = self._state
        self._summary: dict[str, Any] = {
            "status": "running", "model": session.settings.model, "task": session.task.spec.name,
            "method": engine.config.method, "probe": engine.probe.name,
            "world_size": engine.sharding.world_size, "train_examples": len(examples),
        }  # fmt: skip
        task = session.task
        if (majority := majority_accuracy(task.train, task.test)) is not None:
            self._summary["accuracy_majority"] = majority

    @property
    def _state(self) -> tuple[int, int]:
        """Steps done and periods finished: a step may end a period before it counts as begun."""
        return self._engine.step_index, len(self._engine.method.finished)

    @property
    def _stopping(self) -> bool:
        """Whether the run ends here, on all ranks alike, as one was asked to stop."""
        return self._engine.run_state.stopping

    def _halfway(self) -> bool:
        """Returns whether a step has changed the engine and is not in the journal yet; both have to agree."""
        return self._state != self._logged

    def count_padding(self, made: Sequence[Mapping[str, Any]]) -> None:
        """Counts the padding of steps that earlier processes made; what older code has not noted is as it
        would be on these ranks."""
        if self._folder is not None:
            for line in made:
                known = line.get("padding")
                if known or not self._batch.lazy:
                    self._padding.add(known or self._batch.tokens(line["step"]))

    def run(self) -> dict[str, Any]:
        """Trains, and returns the summary."""
        summary, start = self._summary, time.perf_counter()
        try:
            with (
                turned_into_exceptions(
                    self._halfway, self._engine.ask_to_stop, lambda: self._engine.run_state.stopping
                ) as raise_waiting,
                Liveness(self._engine.sharding, self._options.timeout) as alive,
            ):
                self._before(alive)
                trained = time.perf_counter()
                with self._display.steps(self._options.steps):
                    for report in (
                        () if self._stopping or self._evaluations.enough else self._steps(alive)
                    ):
                        self._log(report)
                        raise_waiting()
                        if not self._stopping:
                            self._between(report.step + 1, alive)
                        if self._stopping or self._evaluations.enough:
                            break
                alive.at("the end of the run")
                self._engine.check()
                summary["seconds_training"] = round(time.perf_counter() - trained, 2)
                self._after()
        except Interrupted as signalled:
            summary |= {"status": "interrupted", "error": str(signalled)}
            if not self._engine.config.facts.learns_coefficients:
                signalled.left = (
                    f"evaluate and export replay {REPLAYED}, and the same command goes on"
                )
            raise
        except BaseException as error:
            summary |= {"status": "failed", "error": str(error) or type(error).__name__}
            if not self._engine.config.facts.learns_coefficients:
                self._display.note(f"failed; evaluate and export replay {REPLAYED}")
            raise
        finally:
            seconds = round(time.perf_counter() - start, 2)
            if self.fits.found is not None:
                summary["output_layer"] = self.fits.found
            steps = self._evaluations.last or self._engine.step_index
            summary |= {**self._evaluations.found, "steps": steps, "seconds": seconds}
            if (share := self._padding.share) is not None:
                summary["padding_share"] = share
            if any(self._batch.cut):
                summary["cut_prompts"], summary["cut_answers"] = self._batch.cut
            self._leave()
        return summary

    def _before(self, alive: Liveness) -> None:
        """Makes the evaluations that are missing: before all steps, and one that a kill has cut short."""
        evaluations, done = self._evaluations, self._engine.step_index
        evaluations.recall()
        self._know_trunk()
        for evaluator in evaluations.evaluators.values():
            if evaluator.loss_alone:
                self._display.note(evaluator.loss_alone)
                break
        if self._folder is not None and (told := self._batch.told(self._options.steps)):
            self._display.note(told)
        evaluations.before()
        self._fit(alive)
        evaluations.fitted(not done and self.fits.found is not None)
        if evaluations.due(done):
            evaluations.between(done)
        if not self._stopping:
            self._samples.before(done)

    def _fit(self, alive: Liveness) -> None:
        """Fits the output layer if that is due after the steps so far."""
        if self._stopping:
            return
        alive.at(f"the fit of the output layer after {self._engine.step_index} steps")
        self.fits.fit_if_due()

    def _know_trunk(self) -> None:
        """Finds the model's trunk, says so, and opens its caches, filled as the steps so far did."""
        engine, trunk = self._engine, self._engine.objective.trunk
        if trunk is None:
            return
        if trunk.worth_a_forward:
            engine.settle(self._batch(engine.step_index))
        if trunk.found is not None:
            self._display.note(f"trunk: {trunk}")
        takes = open_caches(
            engine,
            self._examples,
            self._evaluations.evaluators,
            self.base,
            self._options.output,
        )
        if not takes:
            return
        self._display.note(takes)
        first_epoch = math.ceil(len(self._examples) / self._options.batch_size)
        if self.fits.filled:  # before any step
            for batch, _ in self.fits.batches():
                trunk.fill(batch, engine.objective.inputs(batch))
        if again := min(engine.step_index, first_epoch):
            with self._display.evaluation("filling the trunk cache") as progress:
                for step in range(again):
                    engine.objective.fill(self._batch(step))
                    if progress is not None:
                        progress((step + 1) / again)

    def _steps(self, alive: Liveness) -> Iterator[StepReport]:
        for step in range(self._engine.step_index, self._options.steps):
            alive.at(f"the batch of step {step}")
            collated = self._batch(step)
            alive.at(f"step {step}")
            yield self._engine.step(collated)

    def _log(self, report: StepReport) -> None:
        """Logs a step, which counts with its line in the journal."""
        engine = self._engine
        tokens: Sequence[int] = ()
        if self._folder is not None or self._batch.lazy:
            tokens = self._batch.tokens(report.step)
            self._padding.add(tokens)
        if self._folder is not None:
            more = {**self.fits.field(report.step), "padding": tokens, **of_journal(engine)}
            self._folder.log_step(report, engine.step_index * self._options.batch_size, more)
        self._trackers.step(report)
        if not report.step and engine.radius is not None:
            self._display.note(str(engine.radius))
        self._display.step(report)
        self._logged = self._state
        for warning in self._watches.step(report):
            self._display.note(f"warning: {warning}")

    def _between(self, done: int, alive: Liveness) -> None:
        """Makes the snapshot, the fit and the evaluation that are due after `done` steps."""
        options = self._options
        if options.snapshot_every and done % options.snapshot_every == 0:
            alive.at(f"the snapshot after {done} steps")
            snapshot(self._engine, options.output, self._folder, options.snapshots)
        self._fit(alive)
        if self._evaluations.due(done):
            alive.at(f"the evaluation after {done} steps")
            self._evaluations.between(done)
        alive.at(f"the samples after {done} steps")
        self._samples.after(done)

    def _after(self) -> None:
        """Ends the run after its last step: evaluates and saves the model, or notes a stop."""
        if not self._stopping:
            self._evaluations.after()
        if self._stopping:
            self._display.note(
                f"stopped by SIGTERM after step {self._engine.step_index}; the same command goes on from "
                "there"
            )
            self._summary["status"] = "stopped"
            return
        if self._options.save_model:
            self._save_model(self._options.output / MODEL)
            self._summary["merged_model"] = MODEL
        self._summary["status"] = "finished"

    def _save_model(self, path: Path) -> None:
        warning = not_in_merged(self._engine)
        card = model_card(path.parent, self._engine.step_index, adapter=False, warning=warning)
        with self._display.evaluation(f"writing {path}") as progress:
            save_merged(self._engine, path, self._tokenizer, progress=progress, card=card)

    def _leave(self) -> None:
        """Writes what there is on rank 0, whatever ended the run, whose own error is the one to show."""
        if self._folder is None:
            return
        with deaf():
            try:
                write_results(
                    self._engine, self._session.settings.model, self._tokenizer, self._folder,
                    self._summary, self._display,
                )  # fmt: skip
            except StorageError as error:
                if self._summary["status"] in ("finished", "stopped"):
                    raise
                self._display.note(str(error))
