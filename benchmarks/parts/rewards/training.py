"""Training in this process for some processor seconds, as `benchmarks/rewards.py` compares it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from parts.methods.report import Record
from tezo_ds.config import TezoConfig
from tezo_ds.settings import Settings
from tezo_ds.tasks.evaluation import Evaluator
from tezo_ds.training.rewarded import RewardEvaluator
from tezo_ds.training.session import Session, open_session
from tezo_ds.training.step_batches import StepBatches
from tezo_ds.training.trunk_caches import open_caches

SHOWN = 4  # prompts whose completions a record keeps


def trained(
    settings: Settings, config: TezoConfig, batch_size: int, budget: float, zero_shot: bool = False
) -> Record:
    """Trains for so many processor seconds, all that hidden states of the frozen layers take included.

    Args:
        settings: model and data, with test examples.
        config: the tezo block.
        batch_size: examples of a step.
        budget: seconds of a processor.
        zero_shot: whether the test examples are scored before, too, and some completions are kept.

    Returns:
        `steps_made`, `seconds`, `tied`, the share of steps whose branches were all equal, and `value`, the
        accuracy or mean reward of the test examples; with `zero_shot` also `before` and `samples`.
    """
    session = open_session(settings, config, None, batch_size=batch_size)
    engine, examples, evaluator = session.engine, session.encoded(), session.evaluator()
    assert evaluator is not None
    batches = StepBatches(session, examples, batch_size)
    engine.settle(batches(0))
    if isinstance(evaluator, Evaluator):
        open_caches(engine, examples, {"test": evaluator}, None, Path())
    found: Record = {}
    if zero_shot:
        found = {"before": _value(evaluator), "samples": _samples(session, evaluator)}
    steps = tied = 0
    start = time.process_time()
    while time.process_time() - start < budget:
        report = engine.step(batches(steps))
        steps, tied = steps + 1, tied + report.tied
    seconds = time.process_time() - start
    found |= {"steps_made": steps, "seconds": seconds, "tied": tied / max(1, steps)}
    found["value"] = _value(evaluator)
    if zero_shot:
        samples = zip(found["samples"], _samples(session, evaluator), strict=True)
        found["samples"] = [{**one, "after": other["before"]} for one, other in samples]
    return found


def _value(evaluator: Evaluator | RewardEvaluator) -> float:
    score = evaluator()
    value = score.accuracy if score.metric is None else score.metric
    assert value is not None
    return value


def _samples(session: Session, evaluator: Evaluator | RewardEvaluator) -> list[dict[str, Any]]:
    """Returns what the model answers now to the first test prompts, with the right answers."""
    if not isinstance(evaluator, RewardEvaluator):
        return []
    with session.engine.applied():
        made = evaluator.samples(SHOWN)
    tests = session.task.test[:SHOWN]
    return [
        {"prompt": one.prompt, "answer": test.answer, "before": one.completion}
        for one, test in zip(made, tests, strict=True)
    ]
