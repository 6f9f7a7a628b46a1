"""The command `tezo-ds evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tezo_ds.cli.imports import uncollected
from tezo_ds.cli.options import DeepSpeed, complete, takes
from tezo_ds.errors import ConfigError
from tezo_ds.settings import Settings

EVALUATE_HELP = """Measure accuracy and loss of a run's result, or of a bare model, on a task's test examples.

Weights that a run wrote are read from its merged model; where there is none, as after an interrupt, the
run's steps are replayed from the base model, without forward passes.

Under a launcher the ranks shard the model as the run did; otherwise one process holds the whole model.

```
tezo-ds evaluate --run runs/sst2

tezo-ds evaluate --model ./SmolLM2 --task trec --data ./trec
```
"""
OF_TRAINING = (
    "train_examples", "group_by_length", "padding_free", "validation_data",
    "validation_split", "validation_examples",
)  # fmt: skip


@complete
@takes(Settings, without=OF_TRAINING)
def evaluate(
    run: Annotated[
        Path | None, typer.Option(help="run folder; its model, task and result are used")
    ] = None,
    deepspeed: DeepSpeed = None,
    **given: Any,
) -> None:
    """Evaluates a run or a model; see EVALUATE_HELP."""
    with uncollected():
        from tezo_ds.cli.opened import results_of  # imported late, as --help need not wait for it
        from tezo_ds.files.text import to_json
        from tezo_ds.training import session
        from tezo_ds.training.display import REWARD, Display

    asked = results_of(run, deepspeed, given)
    settings = asked.settings
    opened = session.open_session(settings, asked.config, asked.deepspeed, asked.result.ranks)
    display = Display(
        opened.engine.sharding.rank, opened.engine.sharding.world_size, log_every=1, stderr=True
    )
    asked.give(opened.engine, display)
    evaluator = opened.evaluator()
    if evaluator is None:
        raise ConfigError(
            "there are no test examples; pass --test-data or a --test-fraction above 0"
        )
    for note in filter(None, (opened.task.note, evaluator.loss_alone)):
        display.note(note)
    with display.evaluation(f"evaluating {evaluator.examples} test examples") as progress:
        score = evaluator(progress)
    if opened.engine.sharding.rank == 0:
        found: dict[str, Any] = {
            "accuracy": score.accuracy, "loss": score.loss, "test_examples": score.examples
        }  # fmt: skip
        if score.metric is not None:
            metric = REWARD if settings.reward else settings.metric
            found |= {"metric": metric, "value": score.metric, "answers": score.answers}
        print(to_json(found))
