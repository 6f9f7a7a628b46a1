"""The command `tezo-ds probe-layers`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tezo_ds.cli.imports import uncollected
from tezo_ds.cli.options import DeepSpeed, complete, refuse_idle, settings_from, takes
from tezo_ds.config import TezoConfig
from tezo_ds.settings import Settings

PROBE_LAYERS_HELP = """Measure which matrices are worth training, from forward passes alone.

Prints, by kind and by layer, the squared gradient s of the coefficients, its noise S over examples, the
trace of the Hessian, and what a step can gain; and an `--include` to paste. Measures at the calibrated
point: a bias for each label word is fitted first, unless `--output-layer frozen` is given.

```
tezo-ds probe-layers --model ./SmolLM2 --task trec --objective choices --out runs/layers

deepspeed --num_gpus 8 --module -- tezo_ds probe-layers --deepspeed ds_configs/zero3_bf16.json \\
    --model meta-llama/Llama-3.1-8B --task sst2 --examples 512 --out runs/layers

tezo-ds probe-layers --model ./SmolLM2 --task sst2 --include last:12 --together 1 --json
```
"""
BLOCK = (
    "rank", "rank_threshold", "rank_max", "rho", "seed", "queries", "branch_chunk", "micro_batch",
    "shared_trunk", "include", "exclude", "output_layer", "output_layer_examples",
    "inner_layers",
)  # fmt: skip
WIDTH = 200  # columns of the tables, also where stdout is a file


@complete
@takes(TezoConfig, only=BLOCK)
@takes(Settings, without=("test_examples", "group_by_length", "padding_free"))
def probe_layers(
    deepspeed: DeepSpeed = None,
    examples: Annotated[
        int, typer.Option(min=4, help="training examples to measure on, over all ranks together")
    ] = 256,
    columns: Annotated[
        int,
        typer.Option(
            min=1,
            help="columns of U and V to measure each matrix along; its rank: no estimate is made",
        ),
    ] = 1,
    together: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="layers whose matrices of a kind move together, for as many times fewer branches; unset: "
            "a third of all",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="examples of a step of the run that is foreseen")
    ] = 16,
    steps: Annotated[int, typer.Option(min=1, help="steps of the run that is foreseen")] = 1000,
    out: Annotated[
        Path | None, typer.Option(help="folder to make, for layers.json and layers.png")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="print JSON, and nothing else, on stdout")
    ] = False,
    **given: Any,
) -> None:
    """Measures the matrices of a model; see PROBE_LAYERS_HELP."""
    with uncollected():
        from tezo_ds.cli import accelerate
        from tezo_ds.files.text import to_json
        from tezo_ds.probing_layers.files import make_folder, write
        from tezo_ds.probing_layers.report import sentence
        from tezo_ds.quiet import without_bars
        from tezo_ds.training import session
        from tezo_ds.training.display import Display
        from tezo_ds.training.layers_probe import Wanted, probe_layers, refuse_unfit
        from tezo_ds.training.output_layer import OutputLayerFits
        from tezo_ds.training.output_layer import refuse_unfit as refuse_no_fit

    launched = accelerate.launched()
    settings = settings_from(given, launched.settings)
    refuse_idle(settings.fsdp, settings.model_dump())
    overrides = {name: given[name] for name in BLOCK}
    config, deepspeed_config = session.resolve_config(
        deepspeed or launched.deepspeed, overrides, {"output_layer": "bias"}, settings.fsdp
    )
    refuse_unfit(config)
    if out is not None:
        make_folder(out)
    without_bars()
    opened = session.open_session(settings, config, deepspeed_config, batch_size=batch_size)
    refuse_no_fit(opened, saves=False)
    sharding = opened.engine.sharding
    display = Display(sharding.rank, sharding.world_size, log_every=1, stderr=json)
    encoded = opened.encoded()
    OutputLayerFits(opened, encoded, None, display, batch_size).fit_if_due()
    found = probe_layers(
        opened, encoded, Wanted(examples, columns, together, batch_size, steps), display
    )
    if sharding.place != 0:
        return
    if out is not None:
        for problem in write(found, out):
            display.note(problem)
    if json:
        print(to_json(found.as_json(), indent=1))
        return
    display.console.width = max(display.console.width, WIDTH)
    for table in found.tables():
        display.console.print(table)
        display.note("")
    display.note(sentence(found))
