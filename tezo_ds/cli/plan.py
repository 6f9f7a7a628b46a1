"""The command `tezo-ds plan`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tezo_ds.cli.imports import uncollected
from tezo_ds.cli.options import complete, takes
from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError

if TYPE_CHECKING:
    from tezo_ds.plan.hardware import Gpu
    from tezo_ds.plan.job import Job

PLAN_HELP = """Predict memory, traffic and time of a run that is too large to try.

Needs neither GPUs nor weights, only shapes. Beside this engine stand MeZO-style in-place and first-order
Adam, both under ZeRO-3. `--dry-run` then runs the engine's own step with tensors that have no values, and
counts gathers, bytes and tensors.

```
tezo-ds plan --model llama-30b --world 64 --per-node 8 --gpu h100-80g --batch 256 --sharding fsdp2 --dry-run

tezo-ds plan --model llama-30b --world 64 --sharding fsdp2 --include last:12 --trunk-cache memory

tezo-ds plan --model llama-30b --weights int4 --world 1 --gpu rtx-4090 --batch 8 --length 256

tezo-ds plan --model ./my-model --world 16 --gpu a100-40g --length 2048 --queries 4 --sharding zero3-hpz
```
"""
BLOCK = (
    "method", "rank", "queries", "placement", "probe", "branch_chunk", "micro_batch", "shared_trunk",
    "trunk_cache", "trunk_cache_gib", "include", "exclude", "train_vectors", "adapter",
    "adapter_sites", "tt_rank", "tt_modes", "bottleneck", "output_layer",
    "output_layer_every", "output_layer_examples", "output_layer_rank", "inner_layers",
    "inner_maps",
)  # fmt: skip
HARDWARE = "Overrides of --gpu and of what is assumed"


def _hardware(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=HARDWARE)


@complete
@takes(TezoConfig, only=BLOCK)
def plan(
    model: Annotated[
        str, typer.Option(help="built-in name (opt-30b, llama-65b, …), model folder or config.json")
    ],
    world: Annotated[int, typer.Option(min=1, help="ranks, each with a GPU of its own")] = 8,
    per_node: Annotated[int, typer.Option(min=1, help="GPUs in a node")] = 8,
    gpu: Annotated[
        str,
        typer.Option(help="GPU: h100-80g, a100-40g, …; flags below override its numbers"),
    ] = "h100-80g",
    sharding: Annotated[
        str | None,
        typer.Option(
            help="zero3, zero3-hpz, fsdp2, fsdp2-hybrid (a copy in each node) or replicated; unset: zero3, "
            "of quantised weights replicated"
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="form of the weights of linear layers: int8, int4, 8bit or 4bit, as --load-in of train, or "
            "bits a weight with all scales, e.g. 4.25; unset: as the model's config says"
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="examples of a step, over all ranks together; unset: 4 a rank"),
    ] = None,
    length: Annotated[
        int, typer.Option(min=2, help="tokens of an example, padding included")
    ] = 512,
    labels: Annotated[int, typer.Option(min=1, help="labelled tokens of an example")] = 1,
    train_examples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="training examples of all ranks together, for what trunk_cache and output_layer take",
        ),
    ] = None,
    words: Annotated[
        int | None,
        typer.Option(
            min=2, help="label words, for output_layer with --objective choices; unset: of lm"
        ),
    ] = None,
    mean_tokens: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="mean tokens of an example without padding, for trunk_cache; unset: --length",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="dtype of the weights: auto (the config's), bfloat16, float16 or float32"
        ),
    ] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run the Python code of the model's folder")
    ] = False,
    memory: Annotated[float | None, _hardware("memory of a GPU in GiB")] = None,
    flops: Annotated[float | None, _hardware("dense arithmetic of a GPU in TFLOP/s")] = None,
    hbm: Annotated[float | None, _hardware("bandwidth of a GPU's own memory in GB/s")] = None,
    nvlink: Annotated[
        float | None, _hardware("bandwidth into a GPU from others of its node in GB/s")
    ] = None,
    link_gbit: Annotated[
        float, _hardware("bandwidth into a node in Gbit/s, all its adapters together")
    ] = 400,
    efficiency: Annotated[
        float,
        typer.Option(
            min=0.01, max=1, help="share of --flops that is reached", rich_help_panel=HARDWARE
        ),
    ] = 0.5,
    reserved: Annotated[
        float, _hardware("GiB for CUDA's context, NCCL's buffers and fragments")
    ] = 2,
    overlap: Annotated[
        bool,
        typer.Option(
            "--overlap/--no-overlap",
            help="let gathers run beside arithmetic",
            rich_help_panel=HARDWARE,
        ),
    ] = True,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="count the engine's own step, too, on tensors without values",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
    **block: Any,
) -> None:
    """Plans a run; see PLAN_HELP."""
    given = {**locals(), **block}
    with uncollected():
        from tezo_ds.plan import columns as plans
        from tezo_ds.plan import output_layer, report, trunk_table
        from tezo_ds.quiet import without_bars

    without_bars()
    job = _job(given)
    found = plans.columns(job, overlap)
    warnings = plans.advice(job, found[0])
    ways, kept = trunk_table.ways(job, overlap), trunk_table.kept(job, train_examples, mean_tokens)
    examples, fit = train_examples or job.config.output_layer_examples, None
    if examples is not None:
        fit = output_layer.fit_of(
            job.module, job.config, world, examples, labels, words, job.length
        )
    elif job.config.output_layer != "frozen":
        warnings.append("output_layer: name --train-examples for what a fit takes")
    takes = output_layer.seconds(job, fit) if fit else 0.0
    counted = None
    if not as_json:
        report.show(job, found, f"{model} on {world} x {gpu}", warnings)
        trunk_table.show(ways, trunk_table.lines(job, ways, kept))
        if job.run.adapters.sites:
            print(report.of_adapters(job))
        if fit is not None:
            print(output_layer.line(fit, takes, job.config.output_layer_every))
    if dry_run:
        from tezo_ds.plan.dry_run import count

        counted = count(job)
        if not as_json:
            report.show_counted(counted)
    if as_json:
        trunk = trunk_table.as_dict(job, ways, kept)
        fitted = output_layer.as_dict(fit, takes) if fit else None
        print(report.as_json(job, found, warnings, counted, trunk, fitted))


def _job(given: dict[str, Any]) -> Job:
    from tezo_ds.config import resolve
    from tezo_ds.plan.hardware import GIB, Cluster
    from tezo_ds.plan.job import SHARDINGS, Job, Sharded
    from tezo_ds.plan.shapes import skeleton
    from tezo_ds.quantised.forms import form_named, form_stored

    if given["sharding"] not in (None, *SHARDINGS):
        raise ConfigError(f"--sharding {given['sharding']}: must be one of {', '.join(SHARDINGS)}")
    if given["dtype"] not in ("auto", "bfloat16", "float16", "float32"):
        raise ConfigError(f"--dtype {given['dtype']}: must be auto, bfloat16, float16 or float32")
    if given["labels"] >= given["length"]:
        raise ConfigError(f"--labels {given['labels']}: must be below --length {given['length']}")
    config, _ = resolve({}, {name: given[name] for name in BLOCK})
    cluster = Cluster(
        _gpu(given), given["world"], given["per_node"], given["link_gbit"] * 1e9 / 8,
        given["efficiency"], reserved=int(given["reserved"] * GIB),
    )  # fmt: skip
    batch = given["batch"] or 4 * given["world"]
    module = skeleton(given["model"], given["dtype"], given["trust_remote_code"])
    named = given["weights"]
    form = form_stored(getattr(module, "config", None)) if named is None else form_named(named)
    sharding: Sharded = given["sharding"] or ("replicated" if form else "zero3")
    if form and sharding != "replicated":
        raise ConfigError(
            f"--sharding {sharding}: plans of weights in {form.name} are of a copy on each rank; use "
            "--sharding replicated"
        )
    return Job(
        module, config, sharding, cluster, -(-batch // given["world"]), given["length"],
        given["labels"], form=form,
    )  # fmt: skip


def _gpu(given: dict[str, Any]) -> Gpu:
    from tezo_ds.plan.hardware import GIB, gpu

    units = {"memory": GIB, "flops": 1e12, "hbm": 1e9, "nvlink": 1e9}
    asked = {name: given[name] * unit for name, unit in units.items() if given[name]}
    if "memory" in asked:
        asked["memory"] = int(asked["memory"])
    return replace(gpu(given["gpu"]), **asked)
