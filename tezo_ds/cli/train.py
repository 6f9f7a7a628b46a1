"""`tezo-ds train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tezo_ds.cli.options import (
    ComputeDtype,
    Data,
    DataSeed,
    DeepSpeed,
    Dtype,
    EvalBatch,
    Fsdp,
    FsdpOffloadParams,
    FsdpReplicas,
    LabelField,
    MaxLength,
    Model,
    Objective,
    Task,
    Template,
    TestData,
    TestExamples,
    TestFraction,
    Verbalizers,
    data_option,
    refuse_idle,
    settings_from,
)
from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError

TRAIN_HELP = """Fine-tune a model with forward passes alone.

Start it plainly, with `deepspeed`, `torchrun` or `accelerate launch`; the flags are the same. The `--`
keeps launchers from taking `--nu` or `--run` for an option of their own.

```
deepspeed --num_gpus 8 --module -- tezo_ds train --deepspeed ds_configs/zero3_bf16.json \\
    --model meta-llama/Llama-3.1-8B --task sst2 --steps 5000 --output runs/sst2

torchrun --nproc-per-node 8 -m -- tezo_ds train --fsdp \\
    --model meta-llama/Llama-3.1-8B --task sst2 --steps 5000 --output runs/sst2

tezo-ds train --model ./SmolLM2 --task reviews.jsonl --template "{text} It was" \\
    --verbalizers '{"neg": "terrible", "pos": "great"}' --output runs/reviews
```
"""

BLOCK = "Overrides of the tezo block"


def _block(name: str) -> Any:
    """An option for one field of the tezo block, described by the field itself."""
    return typer.Option(help=TezoConfig.model_fields[name].description, rich_help_panel=BLOCK)


def _switch(name: str) -> Any:
    """Likewise, for a field that is on or off."""
    flag = name.replace("_", "-")
    text = TezoConfig.model_fields[name].description
    return typer.Option(f"--{flag}/--no-{flag}", help=text, rich_help_panel=BLOCK)


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
    timeout: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="seconds that a step's collectives wait for the slowest rank, before the run ends and "
            "names it (1800)",
        ),
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="go on with the run that --output holds, on any number of ranks; by default where there "
            "is one of the same configuration",
        ),
    ] = None,
    snapshot_every: Annotated[
        int, typer.Option(min=0, help="steps between snapshots to go on from; 0: none")
    ] = 500,
    snapshots: Annotated[int, typer.Option(min=1, help="snapshots that are kept")] = 2,
    save_model: Annotated[
        bool | None,
        typer.Option(
            "--save-model/--no-save-model",
            help="write the whole merged model into the run folder at the end; without the flag, for "
            "methods that write weights at training (tezo-adam, lozo, mezo)",
        ),
    ] = None,
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
    train_examples: Annotated[int | None, data_option("at most so many training examples")] = None,
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
    rho: Annotated[str | None, _block("rho")] = None,
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
    query_schedule: Annotated[str | None, _block("query_schedule")] = None,
    queries_max: Annotated[int | None, _block("queries_max")] = None,
    query_alpha: Annotated[float | None, _block("query_alpha")] = None,
    query_beta: Annotated[float | None, _block("query_beta")] = None,
    steps_per_epoch: Annotated[int | None, _block("steps_per_epoch")] = None,
    placement: Annotated[str | None, _block("placement")] = None,
    difference: Annotated[str | None, _block("difference")] = None,
    branch_chunk: Annotated[int | None, _block("branch_chunk")] = None,
    memory_budget: Annotated[float | None, _block("memory_budget")] = None,
    micro_batch: Annotated[int | None, _block("micro_batch")] = None,
    clip_kappa: Annotated[float | None, _block("clip_kappa")] = None,
    probe: Annotated[str | None, _block("probe")] = None,
    include: Annotated[list[str] | None, _block("include")] = None,
    exclude: Annotated[list[str] | None, _block("exclude")] = None,
    check_every: Annotated[int | None, _block("check_every")] = None,
) -> None:
    """See TRAIN_HELP."""
    given = dict(locals())
    # Imported late, as transformers and DeepSpeed take seconds that --help need not wait for.
    from tezo_ds.cli import accelerate
    from tezo_ds.export import adapter
    from tezo_ds.run import resuming
    from tezo_ds.run.about import describe
    from tezo_ds.sharding.world import TIMEOUT
    from tezo_ds.tasks import encode, truncations
    from tezo_ds.training import loop, session
    from tezo_ds.training.display import Display, quieten

    if output is None:
        raise ConfigError("--output is missing; name a folder for the run, e.g. runs/first")
    launched = accelerate.launched()
    settings = settings_from(given, launched.settings)
    refuse_idle(settings.fsdp, settings.model_dump())
    overrides = {name: given[name] for name in TezoConfig.model_fields}
    timeout = timeout or TIMEOUT
    source = deepspeed or launched.deepspeed
    config, deepspeed_config = session.resolve_config(
        source, overrides, {"total_steps": steps}, settings.fsdp, timeout
    )
    quieten()
    about = {"steps": steps, "batch_size": batch_size, "deepspeed": deepspeed_config}
    asked = {**describe(settings, config), **about}
    with resuming.begun(output, resume, asked) as (folder, found):
        if found.finished and found.done >= steps:
            if int(os.environ.get("RANK", "0")) == 0:
                print(f"{output} is finished after {found.done} steps; there is nothing to do")
            return
        opened = session.open_session(
            settings, config, deepspeed_config, found.ranks, batch_size=batch_size
        )
        sharding = opened.engine.sharding
        display = Display(sharding.rank, sharding.world_size, log_every)
        display.summary(opened.engine)
        if save_model is None:
            save_model = not config.facts.learns_coefficients
        if save_model and sharding.quantised:
            raise ConfigError(
                f"--save-model: weights are quantised ({sharding.quantised}); turn it off, or add "
                "--no-save-model"
            )
        if config.facts.learns_coefficients and (
            reason := adapter.no_adapter_because(opened.engine)
        ):
            display.note(f"no adapter will be written: {reason}")
        examples = encode(opened.tokenizer, opened.task.train, settings.max_length)
        display.data(opened.task, truncations(examples), settings.max_length)
        resuming.go_on(settings, opened.engine, examples, folder, found, about, display)
        plan = loop.Plan(
            steps, batch_size, eval_every, snapshot_every, snapshots, output, timeout, save_model
        )
        summary = loop.train(opened, plan, examples, folder, display, found.scores)
        display.end(summary, output)
