"""The command `tezo-ds evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tezo_ds.cli.imports import uncollected
from tezo_ds.cli.options import DeepSpeed, complete, refuse_idle, settings_from, takes
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


@complete
@takes(Settings, without=("train_examples",))
def evaluate(
    run: Annotated[
        Path | None, typer.Option(help="run folder; its model, task and result are used")
    ] = None,
    deepspeed: DeepSpeed = None,
    **given: Any,
) -> None:
    """Evaluates a run or a model; see EVALUATE_HELP."""
    with uncollected():
        import torch  # imported late, as --help need not wait for it

        from tezo_ds.cli import accelerate
        from tezo_ds.files.text import to_json
        from tezo_ds.run import results
        from tezo_ds.run.changed import refuse_changed_weights
        from tezo_ds.training import session
        from tezo_ds.training.display import Display, quieten

    launched = accelerate.launched()
    deepspeed = deepspeed or launched.deepspeed
    source: Path | dict[str, Any] | None = deepspeed
    before: dict[str, Any] = {}
    ran, result = None, results.Result()
    if run is not None:
        asked = given["fsdp"] if given["fsdp"] is not None else launched.settings.get("fsdp")
        finished = session.open_result(run, deepspeed, asked, on_base=given["model"] is not None)
        source, ran, result = finished.deepspeed, finished.config, finished.result
        before = finished.settings.model_dump()
    settings = settings_from(given, {**before, **launched.settings})
    refuse_idle(settings.fsdp, given)
    # FSDP2 would gather the weights in another dtype than its shards have, in which those are written.
    gathered = settings.compute_dtype if given["dtype"] is None and not settings.fsdp else None
    writes = result.writes and (ran is None or ran.adapter == "none")
    if gathered and not writes:
        settings.dtype = gathered
    config, deepspeed_config = session.resolve_config(source, {"rank": 1}, fsdp=settings.fsdp)
    quieten()
    opened = session.open_session(settings, ran or config, deepspeed_config, result.ranks)
    if run is not None and given["model"] is None and result.model is None:
        refuse_changed_weights(run, settings.model)
    sharding = opened.engine.sharding
    display = Display(sharding.rank, sharding.world_size, log_every=1, stderr=True)
    result.give(opened.engine, display)
    if gathered and writes and deepspeed_config is None:
        results.gathered_in(opened.engine, getattr(torch, gathered))
    evaluator = opened.evaluator()
    if evaluator is None:
        raise ConfigError(
            "there are no test examples; pass --test-data or a --test-fraction above 0"
        )
    for note in filter(None, (opened.task.note, evaluator.loss_alone)):
        display.note(note)
    with display.evaluation(f"evaluating {evaluator.examples} test examples") as progress:
        score = evaluator(progress)
    if sharding.rank == 0:
        found = {"accuracy": score.accuracy, "loss": score.loss, "test_examples": score.examples}
        print(to_json(found))
