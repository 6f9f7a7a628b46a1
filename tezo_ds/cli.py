"""The command line: `tezo-ds train`, `tezo-ds evaluate` and `tezo-ds export`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError, TezoError
from tezo_ds.export_command import EXPORT_HELP, export
from tezo_ds.flags import (
    ComputeDtype,
    Fsdp,
    FsdpOffloadParams,
    FsdpReplicas,
    refuse_idle,
    settings_from,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Forward-only fine-tuning of language models whose weights are sharded.",
)

TRAIN_HELP = """Fine-tune a model with forward passes alone.

Start it plainly, with `deepspeed`, `torchrun` or `accelerate launch`; the flags are the same.

```
deepspeed --num_gpus 8 --module tezo_ds train --deepspeed ds_configs/zero3_bf16.json \\
    --model meta-llama/Llama-3.1-8B --task sst2 --steps 5000 --output runs/sst2

torchrun --nproc-per-node 8 -m tezo_ds train --fsdp \\
    --model meta-llama/Llama-3.1-8B --task sst2 --steps 5000 --output runs/sst2

tezo-ds train --model ./SmolLM2 --task reviews.jsonl --template "{text} It was" \\
    --verbalizers '{"neg": "terrible", "pos": "great"}' --output runs/reviews
```
"""

EVALUATE_HELP = """Accuracy and loss of a run's result, or of a bare model, on a task's test examples.

Started by a launcher, the ranks shard a run's model as the run did; started plainly, one process holds
it whole.

```
tezo-ds evaluate --run runs/sst2

tezo-ds evaluate --model ./SmolLM2 --task trec --data ./trec
```
"""

DATA, BLOCK = "Task and data", "Overrides of the tezo block"


def _block(name: str) -> Any:
    """An option for one field of the tezo block, described by the field itself."""
    return typer.Option(help=TezoConfig.model_fields[name].description, rich_help_panel=BLOCK)


def _switch(name: str) -> Any:
    """Likewise, for a field that is on or off."""
    flag = name.replace("_", "-")
    text = TezoConfig.model_fields[name].description
    return typer.Option(f"--{flag}/--no-{flag}", help=text, rich_help_panel=BLOCK)


def _data(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=DATA)


# Each flag that both commands take, once.
Model = Annotated[str | None, typer.Option(help="model folder or hub name")]
DeepSpeed = Annotated[
    Path | None,
    typer.Option(help="DeepSpeed JSON with a tezo block; its ZeRO-3 shards the weights"),
]
Task = Annotated[str | None, _data("built-in name, or a .jsonl/.csv file (needs --template)")]
Data = Annotated[
    str | None, _data("local folder or file, in place of the hub, for a built-in task")
]
TestData = Annotated[str | None, _data("test file")]
Template = Annotated[str | None, _data('prompt with columns in braces, e.g. "{text} It was"')]
Verbalizers = Annotated[str | None, _data('label to word, as JSON: {"0": "bad", "1": "good"}')]
Objective = Annotated[
    str | None,
    _data("lm: the answer among all tokens (default); choices: among the task's words alone"),
]
LabelField = Annotated[str | None, _data("column that holds the label")]
TestFraction = Annotated[float | None, _data("held out where there is no test file (0.2)")]
TestExamples = Annotated[int | None, _data("at most so many test examples")]
DataSeed = Annotated[int | None, _data("of the split and of subsets (0)")]
MaxLength = Annotated[int | None, _data("tokens; longer prompts lose their beginning (512)")]
EvalBatch = Annotated[int | None, _data("examples of a rank in one evaluation forward (32)")]
Dtype = Annotated[
    str | None,
    typer.Option(help="auto, float32, bfloat16 or float16; DeepSpeed's config decides where given"),
]


app.command(help=EXPORT_HELP)(export)


@app.callback()
def launched(
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = -1,
) -> None:
    """Takes the flag that the deepspeed launcher puts first; LOCAL_RANK says the same."""


@app.command(help=TRAIN_HELP)
def train(
    model: Model = None,
    output: Annotated[Path | None, typer.Option(help="run folder to make")] = None,
    deepspeed: DeepSpeed = None,
    steps: Annotated[int, typer.Option(min=1, help="training steps")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="examples a step, over all ranks")] = 16,
    eval_every: Annotated[
        int, typer.Option(min=0, help="steps between evaluations; 0: before and after only")
    ] = 0,
    log_every: Annotated[
        int, typer.Option(min=1, help="steps between lines where stdout is no terminal")
    ] = 10,
    dtype: Dtype = None,
    fsdp: Fsdp = None,
    fsdp_replicas: FsdpReplicas = None,
    fsdp_offload_params: FsdpOffloadParams = None,
    compute_dtype: ComputeDtype = None,
    task: Task = None,
    data: Data = None,
    test_data: TestData = None,
    template: Template = None,
    verbalizers: Verbalizers = None,
    label_field: LabelField = None,
    objective: Objective = None,
    test_fraction: TestFraction = None,
    train_examples: Annotated[int | None, _data("at most so many training examples")] = None,
    test_examples: TestExamples = None,
    data_seed: DataSeed = None,
    max_length: MaxLength = None,
    eval_batch_size: EvalBatch = None,
    method: Annotated[str | None, _block("method")] = None,
    rank: Annotated[str | None, _block("rank")] = None,
    rank_threshold: Annotated[float | None, _block("rank_threshold")] = None,
    rank_max: Annotated[int | None, _block("rank_max")] = None,
    refresh_every: Annotated[int | None, _block("refresh_every")] = None,
    nu: Annotated[int | None, _block("nu")] = None,
    rank_scaling: Annotated[bool | None, _switch("rank_scaling")] = None,
    rho: Annotated[float | None, _block("rho")] = None,
    lr: Annotated[float | None, _block("lr")] = None,
    schedule: Annotated[str | None, _block("schedule")] = None,
    warmup_steps: Annotated[int | None, _block("warmup_steps")] = None,
    total_steps: Annotated[int | None, _block("total_steps")] = None,
    momentum: Annotated[float | None, _block("momentum")] = None,
    betas: Annotated[tuple[float, float] | None, _block("betas")] = None,
    eps: Annotated[float | None, _block("eps")] = None,
    bias_correction: Annotated[bool | None, _switch("bias_correction")] = None,
    restore: Annotated[str | None, _block("restore")] = None,
    stochastic_rounding: Annotated[bool | None, _switch("stochastic_rounding")] = None,
    train_vectors: Annotated[bool | None, _switch("train_vectors")] = None,
    seed: Annotated[int | None, _block("seed")] = None,
    queries: Annotated[int | None, _block("queries")] = None,
    probe: Annotated[str | None, _block("probe")] = None,
    include: Annotated[list[str] | None, _block("include")] = None,
    exclude: Annotated[list[str] | None, _block("exclude")] = None,
    check_every: Annotated[int | None, _block("check_every")] = None,
) -> None:
    """See TRAIN_HELP."""
    given = dict(locals())
    # Imported late, as transformers and DeepSpeed take seconds that --help need not wait for.
    from tezo_ds import export, launchers, session, training
    from tezo_ds.display import Display, quieten
    from tezo_ds.runfolder import CONFIG, RunFolder, refuse_used
    from tezo_ds.tasks import encode, truncations

    if output is None:
        raise ConfigError("--output is missing; name a folder for the run, e.g. runs/first")
    launched = launchers.launched()
    settings = settings_from(given, launched.settings)
    refuse_idle(settings.fsdp, settings.model_dump())
    refuse_used(output)
    training.per_rank(batch_size, int(os.environ.get("WORLD_SIZE", "1")))
    overrides = {name: given[name] for name in TezoConfig.model_fields}
    config, deepspeed_config = session.resolve_config(
        deepspeed or launched.deepspeed, overrides, {"total_steps": steps}, settings.fsdp
    )
    quieten()
    opened = session.open_session(settings, config, deepspeed_config)
    sharding = opened.engine.sharding
    display = Display(sharding.rank, sharding.world_size, log_every)
    display.summary(opened.engine)
    if reason := export.no_adapter_because(opened.engine):
        display.note(f"no adapter will be written: {reason}")
    examples = encode(opened.tokenizer, opened.task.train, settings.max_length)
    display.data(opened.task, truncations(examples), settings.max_length)
    folder = None
    if sharding.rank == 0:
        folder = RunFolder(output)
        about = {"steps": steps, "batch_size": batch_size, "deepspeed": deepspeed_config}
        folder.write_json(CONFIG, session.describe_run(opened, about))
    plan = training.Plan(steps, batch_size, eval_every)
    summary = training.train(opened, plan, examples, folder, display)
    display.end(summary, output)


@app.command(help=EVALUATE_HELP)
def evaluate(
    run: Annotated[Path | None, typer.Option(help="run folder: its model, task and result")] = None,
    model: Model = None,
    deepspeed: DeepSpeed = None,
    dtype: Dtype = None,
    fsdp: Fsdp = None,
    fsdp_replicas: FsdpReplicas = None,
    fsdp_offload_params: FsdpOffloadParams = None,
    compute_dtype: ComputeDtype = None,
    task: Task = None,
    data: Data = None,
    test_data: TestData = None,
    template: Template = None,
    verbalizers: Verbalizers = None,
    label_field: LabelField = None,
    objective: Objective = None,
    test_fraction: TestFraction = None,
    test_examples: TestExamples = None,
    data_seed: DataSeed = None,
    max_length: MaxLength = None,
    eval_batch_size: EvalBatch = None,
) -> None:
    """See EVALUATE_HELP."""
    given = dict(locals())
    from tezo_ds import launchers, session
    from tezo_ds.display import Display, quieten
    from tezo_ds.runfolder import to_json

    launched = launchers.launched()
    deepspeed = deepspeed or launched.deepspeed
    source: Path | dict[str, Any] | None = deepspeed
    before: dict[str, Any] = {}
    ran: TezoConfig | None = None
    if run is not None:
        asked = fsdp if fsdp is not None else launched.settings.get("fsdp")
        stored, ran = session.read_run(run)
        source, stored.fsdp = session.sharded_as(run, deepspeed, asked)
        before = stored.model_dump()
    settings = settings_from(given, {**before, **launched.settings})
    refuse_idle(settings.fsdp, given)
    if dtype is None and not settings.fsdp:  # the weights as FSDP2 gathered them
        settings.dtype = settings.compute_dtype or settings.dtype
    config, deepspeed_config = session.resolve_config(source, {"rank": 1}, fsdp=settings.fsdp)
    quieten()
    opened = session.open_session(settings, ran or config, deepspeed_config)
    if run is not None:
        session.load_result(opened.engine, run)
    sharding = opened.engine.sharding
    display = Display(sharding.rank, sharding.world_size, log_every=1)
    evaluator = opened.evaluator()
    if evaluator is None:
        raise ConfigError(
            "there are no test examples; pass --test-data or a --test-fraction above 0"
        )
    with display.evaluation(f"evaluating {evaluator.examples} test examples") as progress:
        score = evaluator(progress)
    if sharding.rank == 0:
        result = {"accuracy": score.accuracy, "loss": score.loss, "test_examples": score.examples}
        print(to_json(result))


def main() -> None:
    """Entry point: errors of the user's in one line, exit code 2; signals 130."""
    from tezo_ds.interrupts import Interrupted

    # On every node once: an error that one rank meets, its neighbours meet as well.
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        app()
    except TezoError as error:
        if speaks:
            print(f"tezo-ds: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as signalled:
        if speaks:
            print(f"tezo-ds: {signalled}; {signalled.left}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
