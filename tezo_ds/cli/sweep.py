"""The command `tezo-ds sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tezo_ds.cli.imports import uncollected
from tezo_ds.cli.several import trials_of
from tezo_ds.cli.train import read_asked, read_flags, train
from tezo_ds.errors import ConfigError

SWEEP_HELP = """Try several values of options of `tezo-ds train`, and find the best.

Takes the options of train, each with as many values as are to be tried, and makes every combination a run in
a folder of its own, one after another on a model that is loaded once. Settings are compared by their
validation loss, seeds of one averaged: each runs a quarter of the steps, the better half goes on to a half of
them, and the better half of those to all (--halvings). A sweep that was stopped goes on by the same command.

```
tezo-ds sweep --model ./SmolLM2 --task sst2 --validation-examples 500 --steps 1000 \\
    --lr 1e-6 3e-6 1e-5 --seed 0 1 2 --output runs/rates

tezo-ds sweep --model ./SmolLM2 --task sst2 --steps 500 --halvings 0 \\
    --include last:4 last:8 --rank 8 32 --output runs/layers
```
"""
CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True}


def sweep(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option(help="folder of the sweep, with a run folder for each run")
    ],
    halvings: Annotated[
        int,
        typer.Option(min=0, help="how often the worse half of the settings is dropped; 0: never"),
    ] = 2,
) -> None:
    """Tries several values of options; see SWEEP_HELP."""
    reader = typer.Typer()
    reader.command()(train)
    trials = trials_of(context.args, typer.main.get_command(reader))
    with uncollected():
        from rich.console import Console

        from tezo_ds.launched import env_rank
        from tezo_ds.quiet import without_bars
        from tezo_ds.sweeping import report
        from tezo_ds.sweeping.halving import Trial, by_setting, rungs_of
        from tezo_ds.sweeping.results import PICTURE, Results
        from tezo_ds.sweeping.runs import Asked, Sweep
        from tezo_ds.training import running

    def read(trial: Trial, folder: Path) -> Asked:
        given = read_flags([*trial.words, "--output", str(folder)], "tezo-ds sweep")
        return read_asked(given.pop("deepspeed"), given)

    first = env_rank() == 0
    console = Console(quiet=not first, highlight=False, markup=False, emoji=False)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    asked = [read(trial, output / trial.name) for trial in trials]
    for one in asked:  # all, before the first takes an hour
        running.refuse_unfit_options(*one[:3])
    if len({options.steps for options, *_ in asked}) > 1:
        raise ConfigError(
            "sweep: --steps has several values; give one, which all runs are compared at"
        )
    without_bars()
    rungs = rungs_of(asked[0][0].steps, halvings, len(by_setting(trials)))
    results = Results(output, {"arguments": context.args, "halvings": halvings}, first)
    swept = Sweep(trials, read, output, results, rungs, say)
    say(
        f"{len(trials)} runs of {len(swept.trials)} settings, compared after "
        f"{', '.join(map(str, swept.rungs))} steps"
    )
    if not swept():
        say("stopped by SIGTERM; the same command goes on from there")
        return
    if not first:
        return
    console.print(report.table_of(swept))
    report.draw(swept, output / PICTURE)
    best = swept.trials[report.best_of(swept)][0]
    if swept.by == "test":
        say(
            "  by the test examples, as there are no validation examples: their score is too good; see "
            "--validation-examples"
        )
    say(f"  picture            {output / PICTURE}")
    say(f"  best run           {output / best.name}")
    say(f"  the same alone     {report.command_of(best, Path('runs') / 'best')}")
