"""The loop of `tezo-ds train`: batches, steps, evaluations, and a run folder that is always whole."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tezo_ds.display import Display
from tezo_ds.engine import Engine, StepReport
from tezo_ds.errors import ConfigError
from tezo_ds.export import save_adapter, save_coefficients
from tezo_ds.interrupts import Interrupted, deaf, turned_into_exceptions
from tezo_ds.loading import load_tokenizer
from tezo_ds.merged import save_merged
from tezo_ds.methods import in_coefficients
from tezo_ds.runfolder import (
    ADAPTER,
    COEFFICIENTS,
    CURVE,
    METRICS,
    SUMMARY,
    RunFolder,
    draw_curve,
)
from tezo_ds.session import Session
from tezo_ds.tasks.batches import batch_indices
from tezo_ds.tasks.encoding import Encoded, collate
from tezo_ds.tasks.evaluation import Evaluator, Score

REPLAYED = f"the steps so far from {METRICS} in the run folder"


@dataclass(frozen=True)
class Plan:
    """How long and on what to run, beyond the engine's own config."""

    steps: int
    batch_size: int  # examples a step over all ranks
    eval_every: int  # steps; 0: before and after only
    model: Path | None = None  # where the merged model goes at the end; None: nowhere


def per_rank(batch_size: int, world_size: int) -> int:
    """Examples a step of one rank.

    Raises:
        ConfigError: ranks would not get equally many.
    """
    if batch_size % world_size:
        raise ConfigError(
            f"--batch-size {batch_size} is over all ranks and does not divide by {world_size} of "
            f"them; use {batch_size - batch_size % world_size or world_size}"
        )
    return batch_size // world_size


def train(
    session: Session,
    plan: Plan,
    examples: Sequence[Encoded],
    folder: RunFolder | None,
    display: Display,
) -> dict[str, Any]:
    """Runs a plan. Every rank calls it; `folder` is rank 0's, None elsewhere.

    On an error or a signal rank 0 still writes coefficients, adapter, curve and summary as of the
    last whole step, which takes no other rank. The merged model, which takes all, is then not written;
    what a method put into the weights can be replayed from metrics.jsonl.

    Returns:
        The summary, as in summary.json.

    Raises:
        TezoError: as the engine does. Interrupted: a signal came.
    """
    engine, start = session.engine, time.perf_counter()
    share = per_rank(plan.batch_size, engine.sharding.world_size)
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
        with turned_into_exceptions(halfway) as raise_waiting:
            evaluator = session.evaluator()
            _evaluate(engine, evaluator, folder, display, summary, "before")
            trained = time.perf_counter()
            with display.steps(plan.steps):
                for report in _steps(engine, plan, examples, share, session.pad_id):
                    if folder is not None:
                        folder.log_step(report)
                    if not report.step and engine.radius is not None:
                        display.note(str(engine.radius))
                    display.step(report)
                    done = report.step + 1
                    logged = done, _ended(engine)
                    raise_waiting()
                    if plan.eval_every and done % plan.eval_every == 0 and done < plan.steps:
                        _evaluate(engine, evaluator, folder, display, summary, None)
            engine.check()
            summary["seconds_training"] = round(time.perf_counter() - trained, 2)
            _evaluate(engine, evaluator, folder, display, summary, "after")
            if plan.model is not None:
                _save_model(session, plan.model, display)
                summary["merged_model"] = plan.model.name
        summary["status"] = "finished"
    except Interrupted as signalled:
        summary |= {"status": "interrupted", "error": str(signalled)}
        if not in_coefficients(engine.config):
            signalled.left = f"evaluate and export replay {REPLAYED}"
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
                _write_results(engine, session.settings.model, folder, summary)
    return summary


def _steps(
    engine: Engine, plan: Plan, examples: Sequence[Encoded], share: int, pad_id: int
) -> Iterator[StepReport]:
    sharding, seed = engine.sharding, engine.config.seed
    for step in range(engine.step_index, plan.steps):
        chosen = batch_indices(len(examples), share, step, seed, sharding.rank, sharding.world_size)
        yield engine.step(collate([examples[i] for i in chosen], pad_id))


def _ended(engine: Engine) -> int:
    """Periods that have ended: a step may end one before it counts as begun."""
    return len(engine.method.finished)


def _save_model(session: Session, path: Path, display: Display) -> None:
    tokenizer = load_tokenizer(session.settings.model, pad=False)
    with display.evaluation(f"writing {path}") as progress:
        save_merged(session.engine, path, tokenizer, progress=progress)


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
        summary[f"accuracy_{when}"], summary[f"test_loss_{when}"] = score.accuracy, score.loss
        summary["test_examples"] = score.examples


def _write_results(engine: Engine, model: str, folder: RunFolder, summary: dict[str, Any]) -> None:
    folder.close()
    if in_coefficients(engine.config):
        save_coefficients(engine.coefficients(), folder.path / COEFFICIENTS)
        try:
            save_adapter(engine, folder.path / ADAPTER, model)
        except ConfigError as error:  # trained something that LoRA has no place for
            summary["adapter"] = str(error)
    folder.write_json(SUMMARY, summary)
    if engine.step_index:
        draw_curve(folder.path / METRICS, folder.path / CURVE)
