"""The command `tezo-ds train`."""

from __future__ import annotations

from typing import Any

from tezo_ds.cli.imports import uncollected
from tezo_ds.cli.options import DeepSpeed, complete, from_flags, refuse_idle, settings_from, takes
from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError
from tezo_ds.launched import env_rank
from tezo_ds.settings import RunOptions, Settings

TRAIN_HELP = """Fine-tune a model with forward passes alone.

Takes the same flags on one process and under `deepspeed`, `torchrun` or `accelerate launch`. The `--`
before the module keeps launchers from reading `--nu` or `--run` as an option of their own.

```
deepspeed --num_gpus 8 --module -- tezo_ds train --deepspeed ds_configs/zero3_bf16.json \\
    --model meta-llama/Llama-3.1-8B --task sst2 --steps 5000 --output runs/sst2

torchrun --nproc-per-node 8 -m -- tezo_ds train --fsdp \\
    --model meta-llama/Llama-3.1-8B --task sst2 --steps 5000 --output runs/sst2

tezo-ds train --model ./SmolLM2 --task reviews.jsonl --template "{text} It was" \\
    --verbalizers '{"neg": "terrible", "pos": "great"}' --output runs/reviews
```
"""


@complete
@takes(TezoConfig)
@takes(Settings)
@takes(RunOptions)
def train(deepspeed: DeepSpeed = None, **given: Any) -> None:
    """Fine-tunes a model; see TRAIN_HELP."""
    # Imported late, as transformers and DeepSpeed take seconds that --help need not wait for.
    with uncollected():
        from tezo_ds.cli import accelerate
        from tezo_ds.export.adapter import no_adapter_because
        from tezo_ds.export.beside import refuse_merged
        from tezo_ds.intake.notices import notices
        from tezo_ds.intake.weights import agreed_fingerprint
        from tezo_ds.run import changed, resuming
        from tezo_ds.run import folder as folder_
        from tezo_ds.run.about import describe
        from tezo_ds.run.results import replay
        from tezo_ds.sharding.world import agreed
        from tezo_ds.training import best, loop, session, step_batches, trackers
        from tezo_ds.training.display import Display, quieten
        from tezo_ds.training.include_auto import Choice, choose_matrices, to_measure
        from tezo_ds.training.output_layer import refuse_unfit

    options = from_flags(RunOptions, given)
    launched = accelerate.launched()
    settings = settings_from(given, launched.settings)
    refuse_idle(settings.fsdp, settings.model_dump())
    config, deepspeed_config = session.resolve_config(
        deepspeed or launched.deepspeed,
        {name: given[name] for name in TezoConfig.model_fields},
        {"total_steps": options.steps}, settings.fsdp, options.timeout,
    )  # fmt: skip
    if options.save_model:
        refuse_merged(config, "--save-model")
    best.refuse_unfit(options, settings, config)
    step_batches.refuse_unfit(settings, config)
    agreed(lambda: trackers.refuse_missing(options.report_to))
    quieten()
    about: dict[str, Any] = {
        "steps": options.steps, "batch_size": options.batch_size, "deepspeed": deepspeed_config
    }  # fmt: skip
    asked = {**describe(settings, config), **about}
    with resuming.begun(options.output, options.resume, asked) as (folder, found):
        if found.finished and found.done >= options.steps:
            if env_rank() == 0:
                print(
                    f"{options.output} is finished after {found.done} steps; there is nothing to do"
                )
            return
        chooses = config.chooses and found.ranks is None
        opened = session.open_session(
            settings, to_measure(config) if chooses else config, deepspeed_config, found.ranks,
            batch_size=options.batch_size,
        )  # fmt: skip
        sharding = opened.engine.sharding
        display = Display(sharding.rank, sharding.world_size, options.log_every)
        display.summary(opened.engine)
        for line in notices(opened.engine):
            display.note(f"warning: {line}")
        in_weights = not config.facts.learns_coefficients
        saves = in_weights if options.save_model is None else options.save_model
        if saves and sharding.quantised:
            raise ConfigError(
                f"--save-model: weights are quantised ({sharding.quantised}); turn it off, or add "
                "--no-save-model"
            )
        if not in_weights and (reason := no_adapter_because(opened.engine)):
            display.note(f"no adapter will be written: {reason}")
        refuse_unfit(opened, saves)
        initial = opened.engine.state() if options.keep == "best" else {}
        max_length = opened.settings.max_length
        examples = opened.encoded()
        display.data(opened.task, examples, max_length)
        choice = Choice()
        if chooses:
            choice = choose_matrices(opened, examples, options, config.trunk_cache, display)
        about[changed.WEIGHTS] = agreed_fingerprint(settings.model)
        about[changed.TESTS] = resuming.fingerprint_of_tests(opened.task.test)
        if opened.task.validation:
            about[changed.VALIDATION] = resuming.fingerprint_of_tests(opened.task.validation)
        data = {"examples": len(examples), "data": resuming.fingerprint(examples)}
        resuming.go_on(settings, opened.engine, data, folder, found, about, display)
        choice.leave(folder, display)
        options = options.model_copy(update={"save_model": saves})

        def rebuild(engine: Any, steps: int) -> None:
            engine.load_state({**initial, **engine.output_layer.state}, written=False)
            replay(engine, found.steps[:steps], display)

        summary = loop.train(
            opened, options, examples, folder, display, found.scores, found.steps, about[changed.WEIGHTS],
            max(found.terms, default=choice.fitted), choice.fit,
            best.Best(options, rebuild, folder_.VALIDATION if opened.task.validation else folder_.TEST),
        )  # fmt: skip
        display.end(summary, options.output, found.done)
