"""The loop of `tezo-ds train`: batches, steps, evaluations, and a run folder that is always whole."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tezo_ds.card import model_card
from tezo_ds.curve import draw_curve
from tezo_ds.display import Display
from tezo_ds.engine import Engine
from tezo_ds.errors import ConfigError, StorageError
from tezo_ds.export import save_adapter, save_coefficients
from tezo_ds.interrupts import Interrupted, deaf, turned_into_exceptions
from tezo_ds.liveness import Liveness
from tezo_ds.loading import load_tokenizer
from tezo_ds.merged import save_merged
from tezo_ds.methods import in_coefficients
from tezo_ds.report import StepReport
from tezo_ds.resuming import snapshot
from tezo_ds.runfolder import (
    ADAPTER,
    COEFFICIENTS,
    CURVE,
    JOURNAL,
    METRICS,
    MODEL,
    SUMMARY,
    RunFolder,
)
from tezo_ds.runstate import digest, take
from tezo_ds.session import Session
from tezo_ds.tasks.batches import batch_indices
from tezo_ds.tasks.encoding import Encoded, collate
from tezo_ds.tasks.evaluation import Evaluator, Score

REPLAYED = f"the steps so far from {JOURNAL} in the run folder"


@dataclass(frozen=True)
class Plan:
    """How long and on what to run, beyond the engine's own config."""

    steps: int
    batch_size: int  # examples a step over all ranks
    eval_every: int  # steps; 0: before and after only
    snapshot_every: int  # steps; 0: never
    snapshots: int  # that are kept
    folder: Path  # of the run
    timeout: float  # seconds that a collective waits for the slowest rank
    save_model: bool = False  # write the merged model at the end


def train(
    session: Session,
    plan: Plan,
    examples: Sequence[Encoded],
    folder: RunFolder | None,
    display: Display,
    scores: Mapping[int, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Runs a plan, from the engine's next step on. Every rank calls it; `folder` is rank 0's, None elsewhere.

    On an error or a signal rank 0 still writes coefficients, adapter, curve and summary as of the
    last whole step, which takes no other rank. The merged model, which takes all, is then not written;
    what a method put into the weights can be replayed from the journal. A SIGTERM on any rank ends the
    run after the step that all are in, likewise, and without its last evaluation.

    Args:
        scores: of a run that goes on, the lines of its evaluations, by the steps before them.

    Returns:
        The summary, as in summary.json.

    Raises:
        TezoError: as the engine does. Interrupted: a signal came.
    """
    engine, start = session.engine, time.perf_counter()
    check_every = engine.config.check_every
    summary: dict[str, Any] = {
        "status": "running", "model": session.settings.model, "task": session.task.spec.name,
        "method": engine.config.method, "probe": engine.probe.name,
        "world_size": engine.sharding.world_size, "train_examples": len(examples),
    }  # fmt: skip
    logged = engine.step_index, _ended(engine)

    def halfway() -> bool:
        """Between what a step changes and its line in metrics.jsonl, which have to agree."""
        return (engine.step_index, _ended(engine)) != logged

    try:
        with (
            turned_into_exceptions(halfway, engine.ask_to_stop) as raise_waiting,
            Liveness(engine.sharding, plan.timeout) as alive,
        ):
            evaluator = session.evaluator()
            if scores and 0 in scores:
                summary |= _scores("before", scores[0])
            else:
                _evaluate(engine, evaluator, folder, display, summary, "before")
            done = engine.step_index
            if _due(plan, done) and done not in (scores or {}):  # killed in the middle of it
                _evaluate(engine, evaluator, folder, display, summary, None)
            trained = time.perf_counter()
            with display.steps(plan.steps):
                for report in _steps(engine, plan, examples, session.pad_id, alive):
                    if folder is not None:
                        known = check_every and engine.step_index % check_every == 0
                        state = digest(take(engine)) if known else None
                        folder.log_step(report, engine.step_index * plan.batch_size, state)
                    if not report.step and engine.radius is not None:
                        display.note(str(engine.radius))
                    display.step(report)
                    done = report.step + 1
                    logged = done, _ended(engine)
                    raise_waiting()
                    if report.stopping:
                        break
                    if plan.snapshot_every and done % plan.snapshot_every == 0:
                        snapshot(engine, plan.folder, folder, plan.snapshots)
                    if _due(plan, done):
                        alive.at(f"the evaluation after step {report.step}")
                        _evaluate(engine, evaluator, folder, display, summary, None)
            alive.at("the end of the run")
            engine.check()
            summary["seconds_training"] = round(time.perf_counter() - trained, 2)
            stopped = engine.measuring.stopping
            if stopped:
                display.note(
                    f"stopped by SIGTERM after step {engine.step_index}; the same command goes on from "
                    "there"
                )
            else:
                _evaluate(engine, evaluator, folder, display, summary, "after")
            if plan.save_model and not stopped:
                _save_model(session, plan.folder / MODEL, display)
                summary["merged_model"] = MODEL
        summary["status"] = "stopped" if stopped else "finished"
    except Interrupted as signalled:
        summary |= {"status": "interrupted", "error": str(signalled)}
        if not in_coefficients(engine.config):
            signalled.left = f"evaluate and export replay {REPLAYED}, and the same command goes on"
        raise
    except BaseException as error:
        summary |= {"status": "failed", "error": str(error) or type(error).__name__}
        if not in_coefficients(engine.config):
            display.note(f"failed; evaluate and export replay {REPLAYED}")
        raise
    finally:
        summary |= {"steps": engine.step_index, "seconds": round(time.perf_counter() - start, 2)}
        if folder is not None:
            with deaf():
                try:
                    _write_results(engine, session.settings.model, folder, summary)
                except StorageError as error:
                    if summary["status"] not in ("finished", "stopped"):
                        display.note(str(error))  # what ended the run is said by its own error
                    else:
                        raise
    return summary


def _steps(
    engine: Engine, plan: Plan, examples: Sequence[Encoded], pad_id: int, alive: Liveness
) -> Iterator[StepReport]:
    rank, world_size, seed = engine.sharding.rank, engine.sharding.world_size, engine.config.seed
    for step in range(engine.step_index, plan.steps):
        alive.at(f"the batch of step {step}")
        chosen = batch_indices(len(examples), plan.batch_size, step, seed, rank, world_size)
        batch = collate([examples[i] for i in chosen], pad_id, filler=examples[0])
        alive.at(f"step {step}")
        yield engine.step(batch)


def _due(plan: Plan, done: int) -> bool:
    """Whether an evaluation follows so many steps; those before and after all steps are not counted."""
    return plan.eval_every > 0 and done % plan.eval_every == 0 and 0 < done < plan.steps


def _ended(engine: Engine) -> int:
    """Periods that have ended: a step may end one before it counts as begun."""
    return len(engine.method.finished)


def _save_model(session: Session, path: Path, display: Display) -> None:
    tokenizer = load_tokenizer(session.settings.model, pad=False)
    with display.evaluation(f"writing {path}") as progress:
        card = model_card(path.parent, session.engine.step_index, adapter=False)
        save_merged(session.engine, path, tokenizer, progress=progress, card=card)


def _evaluate(
    engine: Engine, evaluator: Evaluator | None, folder: RunFolder | None, display: Display,
    summary: dict[str, Any], when: str | None,
) -> None:  # fmt: skip
    if evaluator is None:
        return
    with display.evaluation(f"evaluating {evaluator.examples} test examples") as progress:
        score: Score = evaluator(progress)
    if folder is not None:
        folder.log_score(engine.step_index, score.accuracy, score.loss, score.examples)
    display.score(engine.step_index, score)
    if when is not None:
        line = {"test_accuracy": score.accuracy, "test_loss": score.loss}
        summary |= _scores(when, {**line, "test_examples": score.examples})


def _scores(when: str, line: Mapping[str, Any]) -> dict[str, Any]:
    """Of the summary, by an evaluation's line in metrics.jsonl."""
    return {
        f"accuracy_{when}": line["test_accuracy"], f"test_loss_{when}": line["test_loss"],
        "test_examples": line["test_examples"],
    }  # fmt: skip


def _write_results(engine: Engine, model: str, folder: RunFolder, summary: dict[str, Any]) -> None:
    folder.close()
    if in_coefficients(engine.config):
        save_coefficients(engine.coefficients(), folder.path / COEFFICIENTS)
        try:
            card = model_card(folder.path, engine.step_index, adapter=True)
            save_adapter(engine, folder.path / ADAPTER, model, card)
        except ConfigError as error:  # trained something that LoRA has no place for
            summary["adapter"] = str(error)
    folder.write_json(SUMMARY, summary)
    if engine.step_index:
        draw_curve(folder.path / METRICS, folder.path / CURVE)
