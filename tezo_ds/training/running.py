"""One run of `tezo-ds train`, from settings that are read to a finished run folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError
from tezo_ds.export.adapter import no_adapter_because
from tezo_ds.export.beside import refuse_merged
from tezo_ds.intake.notices import notices
from tezo_ds.intake.weights import agreed_fingerprint
from tezo_ds.launched import env_rank
from tezo_ds.quiet import keep_in
from tezo_ds.run import changed, resuming
from tezo_ds.run.about import describe
from tezo_ds.run.folder import TEST, VALIDATION
from tezo_ds.run.results import replay
from tezo_ds.settings import RunOptions, Settings
from tezo_ds.sharding.world import agreed
from tezo_ds.training import best, loop, rewarded, step_batches, trackers
from tezo_ds.training.display import Display
from tezo_ds.training.include_auto import Choice, choose_matrices, to_measure
from tezo_ds.training.output_layer import refuse_unfit
from tezo_ds.training.session import Session, open_session

Open = Callable[[TezoConfig, "dict[str, int] | None"], Session]


def refuse_unfit_options(options: RunOptions, settings: Settings, config: TezoConfig) -> None:
    """Raises ConfigError if options of a run do not go together. All ranks must call this, in the world."""
    if options.save_model:
        refuse_merged(config, "--save-model")
    best.refuse_unfit(options, settings, config)
    step_batches.refuse_unfit(settings, config)
    agreed(lambda: trackers.refuse_missing(options.report_to))
    rewarded.refuse_unfit(settings, options, config)


def run(
    options: RunOptions, settings: Settings, config: TezoConfig, deepspeed: dict[str, Any] | None,
    open_: Open | None = None, make_display: Callable[..., Display] = Display,
) -> dict[str, Any] | None:  # fmt: skip
    """Trains in the options' folder, from where the run in it is. All ranks must call this.

    Args:
        options: the run's length, and what it keeps and shows.
        settings: model, data and sharding.
        config: the tezo block.
        deepspeed: DeepSpeed config that shards the weights; None: none does.
        open_: (config, ranks chosen before): gives the session; None: it is opened as the settings say.
        make_display: makes the receiver of notices and progress.

    Returns:
        The summary, as in summary.json; None where the run was finished before.

    Raises:
        TezoError: one line that says what to change. Interrupted: a signal came.
    """
    about: dict[str, Any] = {
        "steps": options.steps, "batch_size": options.batch_size, "deepspeed": deepspeed
    }  # fmt: skip
    asked = {**describe(settings, config), **about}
    with resuming.begun(options.output, options.resume, asked) as (folder, found):
        if found.finished and found.done >= options.steps:
            if env_rank() == 0:
                print(
                    f"{options.output} is finished after {found.done} steps; there is nothing to do"
                )
            return None
        chooses = config.chooses and found.ranks is None
        measured = to_measure(config) if chooses else config
        if open_ is not None:
            opened = open_(measured, found.ranks)
        else:
            size = options.batch_size
            opened = open_session(settings, measured, deepspeed, found.ranks, batch_size=size)
        sharding = opened.engine.sharding
        display = make_display(sharding.rank, sharding.world_size, options.log_every)
        display.summary(opened.engine)
        for line in notices(opened.engine):
            display.note(f"warning: {line}")
        in_weights = not config.facts.learns_coefficients
        saves = in_weights if options.save_model is None else options.save_model
        if saves and sharding.quantised and not (sharding.packed and sharding.runs_alone):
            raise ConfigError(
                f"--save-model: weights are quantised ({sharding.quantised}); turn it off, or add "
                "--no-save-model"
            )
        if not in_weights and (reason := no_adapter_because(opened.engine)):
            display.note(f"no adapter will be written: {reason}")
        refuse_unfit(opened, saves)
        initial = opened.engine.state() if options.keep == "best" else {}
        examples = opened.encoded()
        display.data(opened.task, examples, opened.settings.max_length)
        choice = Choice()
        if chooses:
            choice = choose_matrices(opened, examples, options, config.trunk_cache, display)
        about[changed.WEIGHTS] = agreed_fingerprint(settings.model)
        about[changed.TESTS] = resuming.fingerprint_of_tests(opened.task.test)
        if opened.task.validation:
            about[changed.VALIDATION] = resuming.fingerprint_of_tests(opened.task.validation)
        data = {"examples": len(examples), "data": resuming.fingerprint(examples)}
        resuming.go_on(settings, opened.engine, data, folder, found, about, display)
        keep_in(options.output)
        choice.leave(folder, display)
        options = options.model_copy(update={"save_model": saves})

        def rebuild(engine: Any, steps: int) -> None:
            engine.load_state({**initial, **engine.output_layer.state}, written=False)
            replay(engine, found.steps[:steps], display)

        summary = loop.train(
            opened, options, examples, folder, display, found.scores, found.steps, about[changed.WEIGHTS],
            max(found.terms, default=choice.fitted), choice.fit,
            best.Best(options, rebuild, VALIDATION if opened.task.validation else TEST),
        )  # fmt: skip
        display.end(summary, options.output, found.done)
    return summary
