"""The command `tezo-ds doctor`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tezo_ds.cli.imports import uncollected
from tezo_ds.cli.train import read_flags
from tezo_ds.config import TezoConfig
from tezo_ds.settings import RunOptions

if TYPE_CHECKING:
    from tezo_ds.doctor.flags import RunFlags

DOCTOR_HELP = """Check a machine or a cluster before a long run.

Takes all flags of `tezo-ds train` and needs none: start it as the run will be started, with the word `train`
replaced. Rank 0 prints a row for each check; the exit code is 1 where a check failed, and 0 otherwise.
Ranks report through the launcher's store, so a broken connection is a row and not a hang.

```
tezo-ds doctor

tezo-ds doctor --hostfile hosts --model meta-llama/Llama-3.1-8B --output runs/sst2

deepspeed --hostfile hosts --module -- tezo_ds doctor --deepspeed ds_configs/zero3_bf16.json \\
    --model meta-llama/Llama-3.1-8B --output /shared/runs/sst2

torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
    -m -- tezo_ds doctor --fsdp --fsdp-replicas 2 --model ./my-model
```
"""
CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True}


def doctor(
    context: typer.Context,
    hostfile: Annotated[
        Path | None,
        typer.Option(
            help="file with lines 'host slots=N', of the run to come; its hosts are asked by ssh"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    wait: Annotated[
        float, typer.Option(min=1, help="seconds to wait for a rank that does not answer")
    ] = 120,
) -> None:
    """Examines a machine or a cluster; see DOCTOR_HELP."""
    flags = _run_flags(read_flags(context.args, "tezo-ds doctor"), hostfile)
    from tezo_ds.doctor import meeting as meetings
    from tezo_ds.doctor.checks import examine
    from tezo_ds.doctor.report import exit_code, show
    from tezo_ds.errors import ShardingError
    from tezo_ds.quiet import without_bars

    without_bars()
    try:
        meeting = meetings.meet(wait)
        rows = examine(flags, meeting)
        if meeting.rank == 0:
            show(rows, as_json)
        code = meeting.tell("verdict", exit_code(rows))
        meeting.leave()
    except ShardingError as error:  # of this rank; others are told by rank 0
        print(f"tezo-ds: error: {error}", file=sys.stderr)
        code = 1
    if meetings.hung():  # a collective that never ends would keep the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run_flags(given: dict[str, Any], hostfile: Path | None) -> RunFlags:
    with uncollected():
        from tezo_ds.cli import accelerate
        from tezo_ds.cli.options import from_flags, refuse_idle, settings_from
        from tezo_ds.doctor.flags import RunFlags
        from tezo_ds.training import session

    launched = accelerate.launched()
    settings = settings_from(given, {"model": "", "task": "", **launched.settings})
    refuse_idle(settings.fsdp, settings.model_dump())
    options = from_flags(RunOptions, given, {"output": "unsaid"})
    config, deepspeed = session.read_config(
        given["deepspeed"] or launched.deepspeed,
        {name: given[name] for name in TezoConfig.model_fields},
        {"total_steps": options.steps},
        settings.fsdp,
    )
    merged = options.save_model
    return RunFlags(
        settings, config, deepspeed, given["output"], hostfile,
        options.snapshots if options.snapshot_every else 0,
        not config.facts.learns_coefficients if merged is None else merged,
    )  # fmt: skip
