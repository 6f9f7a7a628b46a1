"""Evaluations of a run: when, of which examples, and which of them its result is.

Test examples are scored before the first and after the last step, and in between too where there are no
validation examples. With validation examples those are what a run is judged by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tezo_ds.run.folder import PARTS, TEST, VALIDATION, RunFolder
from tezo_ds.settings import RunOptions
from tezo_ds.tasks.evaluation import Evaluator, Score, Stopped
from tezo_ds.training.best import Best
from tezo_ds.training.display import REWARD, Display
from tezo_ds.training.rewarded import RewardEvaluator
from tezo_ds.training.session import Session
from tezo_ds.training.trackers import Trackers

Scores = Mapping[
    str, Mapping[int | str, Mapping[str, Any]]
]  # lines by part, and by steps before them


class Evaluations:
    """Evaluations of one run.

    Attributes:
        evaluators: by part, those that there are.
        judge: part by which the run is judged on its way.
        last: step made, where the engine went back to an earlier one; None: it did not.
        found: what the summary says of them.

    Args:
        session: a session with its engine.
        options: the run's options.
        folder: the run's folder, on rank 0.
        display: receiver of notices and progress.
        scored: evaluations that earlier processes made.
        best: what is done with the best one; None: nothing.
        trackers: receiver of scores.
    """

    def __init__(
        self, session: Session, options: RunOptions, folder: RunFolder | None, display: Display,
        scored: Scores, best: Best | None, trackers: Trackers,
    ) -> None:  # fmt: skip
        self._session, self._options, self._folder = session, options, folder
        self._display, self._best, self._trackers = display, best, trackers
        self._engine = session.engine
        found = {part: session.evaluator(part) for part in PARTS}
        self.evaluators: dict[str, Evaluator | RewardEvaluator] = {
            part: each for part, each in found.items() if each is not None
        }
        self.judge = VALIDATION if VALIDATION in self.evaluators else TEST
        self._scored = {part: dict(scored.get(part, {})) for part in PARTS}
        self.last: int | None = None
        self.found: dict[str, Any] = {}

    @property
    def enough(self) -> bool:
        """Whether the run ends here, as nothing better has come for long."""
        return self._best is not None and self._best.over

    @property
    def _stopping(self) -> bool:
        return self._engine.run_state.stopping

    def recall(self) -> None:
        """Takes note of the evaluations that earlier processes made."""
        lines = self._scored[self.judge]
        for step in sorted(step for step in lines if isinstance(step, int)):
            self._see(step, lines[step], earlier=True)

    def before(self) -> None:
        """Makes the evaluations before all steps that are missing, without a fitted output layer."""
        for part in self.evaluators:
            if 0 in self._scored[part]:
                self.found |= _fields("before", self._scored[part][0], part)
            elif not self._stopping:
                with self._engine.output_layer.off():  # which a killed run may have left
                    self._evaluate(part, "before")

    def fitted(self, now: bool) -> None:
        """Makes the evaluation of the test examples right after the output layer's fit before all steps, if
        that was `now`, or takes an earlier process's."""
        if line := self._scored[TEST].get("output_layer"):
            self.found |= _fields("output_layer", line, TEST)
        elif now and TEST in self.evaluators:
            self._evaluate(TEST, "output_layer")

    def due(self, done: int) -> bool:
        """Returns whether an evaluation follows `done` steps, other than those before and after all steps."""
        every = self._options.eval_every
        return every > 0 and done % every == 0 and 0 < done < self._options.steps

    def between(self, done: int) -> None:
        """Makes the evaluation that follows `done` steps, unless an earlier process has."""
        if self.judge in self.evaluators and done not in self._scored[self.judge]:
            self._evaluate(self.judge, None)

    def after(self) -> None:
        """Makes the evaluations after the last step, and lets the best be the result if that was asked for;
        the test examples are scored at the result."""
        if self.judge in self.evaluators:
            self._evaluate(self.judge, "after")
            if not self._stopping:
                self._keep_best()
        if self.judge != TEST and TEST in self.evaluators and not self._stopping:
            self._evaluate(TEST, "after")

    def _keep_best(self) -> None:
        best, last = self._best, self._engine.step_index
        if best is None:
            return
        by = "" if self.judge == TEST else f" on the {self.judge} examples"
        if self.enough:
            self._display.note(
                f"ended after {last} steps: no evaluation{by} was better than that after {best.step}"
            )
        if best.give(self._engine):
            self.last = last
            self.found |= _fields("after", best.line, self.judge) | {"kept_step": best.step}
            self._display.note(
                f"kept: the coefficients after {best.step} of {last} steps, the best evaluation's{by}"
            )

    def _see(self, step: int, line: Mapping[str, Any], earlier: bool = False) -> None:
        if self._best is not None and self.judge in self.evaluators:
            self._best.see(step, line, None if earlier else self._engine)

    def _evaluate(self, part: str, when: str | None) -> None:
        evaluator, step = self.evaluators[part], self._engine.step_index
        fit = when == "output_layer"
        try:
            with self._display.evaluation(
                f"evaluating {evaluator.examples} {part} examples"
            ) as progress:
                score = evaluator(progress, lambda: self._engine.measuring.asked)
        except Stopped:
            self._engine.run_state.stopping = True
            return
        if self._folder is not None:
            after = when if fit else None
            self._folder.log_score(
                step,
                score.accuracy,
                score.loss,
                score.examples,
                after,
                score.metric,
                part,
                score.answers,
            )
        name = REWARD if self._session.settings.reward else self._session.settings.metric
        shown = "with the output layer fitted" if fit else None
        self._display.score(step, score, shown, name, part)
        line = _line(score, part)
        self._trackers.score(line, step, "output_layer" if fit else "")
        if part == self.judge and not fit:
            self._see(step, line)
        if when is not None:
            self.found |= _fields(when, line, part)
            if score.metric is not None:
                self.found["metric"] = name


def _line(score: Score, part: str) -> dict[str, Any]:
    """Returns a score's fields of its line in metrics.jsonl."""
    line: dict[str, Any] = {
        f"{part}_accuracy": score.accuracy, f"{part}_loss": score.loss,
        f"{part}_examples": score.examples,
    }  # fmt: skip
    if score.answers:
        line[f"{part}_answers"] = list(score.answers)
    return line if score.metric is None else {**line, f"{part}_metric": score.metric}


def _fields(when: str, line: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Returns fields of the summary, from an evaluation's line in metrics.jsonl; those of the test examples
    have no part's name but in their loss and number."""
    of = "" if part == TEST else f"{part}_"
    metric = f"{part}_metric"
    more = {f"{of}metric_{when}": line[metric]} if metric in line else {}
    return {
        f"{of}accuracy_{when}": line[f"{part}_accuracy"], f"{part}_loss_{when}": line[f"{part}_loss"],
        f"{part}_examples": line[f"{part}_examples"], **more,
    }  # fmt: skip
