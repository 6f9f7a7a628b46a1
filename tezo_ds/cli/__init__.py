"""The command line `tezo-ds`: a file a command; `main` turns errors into one line and an exit code."""

from __future__ import annotations

import functools
import inspect
import io
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

import tezo_ds
from tezo_ds.cli import (
    doctor,
    env,
    evaluate,
    export,
    generate,
    plan,
    probe_layers,
    replay,
    sweep,
    train,
)
from tezo_ds.errors import TezoError
from tezo_ds.launched import env_local_rank, env_rank, env_world_size
from tezo_ds.quiet import sieved
from tezo_ds.repeatable import ask_mkl

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Forward-only fine-tuning of language models whose weights are sharded.",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"tezo-ds {tezo_ds.__version__}")
        raise typer.Exit


@app.callback()
def launched(
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = -1,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Takes the flag that the deepspeed launcher puts first; LOCAL_RANK says the same."""


_VERBOSE = typer.Option(
    "--verbose", help="show all that libraries log, warn of and count by progress bars"
)


def _quiet(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator: a command shows of libraries what a user can act on, or with `--verbose` everything."""
    before = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(*context: Any, verbose: bool = False, **given: Any) -> None:
        with sieved(verbose):
            command(*context, **given)

    option = inspect.Parameter(
        "verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, _VERBOSE]
    )  # fmt: skip
    parameters = [*before.parameters.values(), option]
    run.__signature__ = before.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


app.command(help=train.TRAIN_HELP)(_quiet(train.train))
app.command(help=evaluate.EVALUATE_HELP)(_quiet(evaluate.evaluate))
app.command(help=generate.GENERATE_HELP)(_quiet(generate.generate))
app.command(help=export.EXPORT_HELP)(_quiet(export.export))
app.command(help=replay.REPLAY_HELP)(_quiet(replay.replay))
app.command(help=doctor.DOCTOR_HELP, context_settings=doctor.CONTEXT)(_quiet(doctor.doctor))
app.command(help=plan.PLAN_HELP)(_quiet(plan.plan))
app.command(help=env.ENV_HELP)(_quiet(env.env))
app.command(help=probe_layers.PROBE_LAYERS_HELP)(_quiet(probe_layers.probe_layers))
app.command(help=sweep.SWEEP_HELP, context_settings=sweep.CONTEXT)(_quiet(sweep.sweep))


class Left(SystemExit):
    """The end of a process that was in a world of ranks, if of one; see `tezo_ds.__main__.leave`."""


def main() -> None:
    """Runs the command line: errors of the user's in one line, exit code 2; signals 130."""
    ask_mkl()
    _take_any_text()
    launched = bool(os.environ.get("RANK"))
    of_others = _in_world()  # one that was joined before is not ours to leave
    try:
        _run()
    except SystemExit as ended:
        if of_others or not _in_world():
            raise
        # NCCL asks for it. After an error other ranks may hang, and to leave would be to wait for them.
        if launched and not ended.code:
            sys.modules["torch.distributed"].destroy_process_group()
        raise Left(ended.code) from ended


def _run() -> None:
    from tezo_ds.training.interrupts import Interrupted

    speaks = True
    try:
        # On every node once: an error that one rank meets, its neighbours meet as well.
        speaks = env_local_rank() == 0
        env_rank(), env_world_size()  # refused here, before libraries read them in their own ways
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            if not os.environ.get(name, "unset").strip():
                del os.environ[name]  # for the libraries, too
        app()
    except TezoError as error:
        if speaks if error.speaks is None else error.speaks:
            print(f"tezo-ds: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as signalled:
        if speaks:
            print(f"tezo-ds: {signalled}; {signalled.left}", file=sys.stderr)
        sys.exit(130)


def _take_any_text() -> None:
    """Lets stdout and stderr replace what their encoding lacks, such as κ in latin-1, in place of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def _in_world() -> bool:
    """Returns whether there is a process group, without importing torch, which --help need not wait for."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_initialized())
