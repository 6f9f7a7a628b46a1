"""The command `tezo-ds train`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from tezo_ds.cli.imports import uncollected
from tezo_ds.cli.options import DeepSpeed, complete, from_flags, refuse_idle, settings_from, takes
from tezo_ds.config import TezoConfig
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
        from tezo_ds.quiet import without_bars
        from tezo_ds.training import running

    asked = read_asked(deepspeed, given)
    running.refuse_unfit_options(*asked[:3])
    without_bars()
    running.run(*asked)


def read_flags(arguments: Sequence[str], program: str) -> dict[str, Any]:
    """Returns the flags that `tezo-ds train` would be called with, as the command `program` takes them, too.

    Raises:
        An error of usage, where `tezo-ds train` would refuse them.
    """

    @functools.wraps(train)
    def given(**flags: Any) -> dict[str, Any]:
        return flags

    reader = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    reader.command()(given)
    found: dict[str, Any] = reader(list(arguments), prog_name=program, standalone_mode=False)
    return found


def read_asked(
    deepspeed: Path | None, given: Mapping[str, Any]
) -> tuple[RunOptions, Settings, TezoConfig, dict[str, Any] | None]:
    """Reads what flags ask for, and joins the launcher's world; returns what `running.run` takes.

    Raises:
        ConfigError: a flag is missing, out of range, or does not go with others.
    """
    from tezo_ds.cli import accelerate
    from tezo_ds.training import session

    options = from_flags(RunOptions, given)
    launched = accelerate.launched()
    settings = settings_from(given, launched.settings)
    refuse_idle(settings.fsdp, settings.model_dump())
    config, deepspeed_config = session.resolve_config(
        deepspeed or launched.deepspeed,
        {name: given[name] for name in TezoConfig.model_fields},
        {"total_steps": options.steps}, settings.fsdp, options.timeout,
    )  # fmt: skip
    return options, settings, config, deepspeed_config
