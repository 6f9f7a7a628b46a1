"""The command `tezo-ds export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tezo_ds.cli.imports import uncollected
from tezo_ds.cli.options import complete, takes
from tezo_ds.errors import ConfigError
from tezo_ds.settings import Settings

if TYPE_CHECKING:  # what takes seconds to import is imported late, as --help need not wait for it
    from tezo_ds.engine.engine import Engine
    from tezo_ds.training.display import Display

EXPORT_HELP = """Write a run's result as a whole merged model, or as a LoRA adapter, for other tools.

The merged model is written while it is gathered, tensor by tensor. Under a launcher the ranks shard the
model as the run did, and none holds more than its shard and two layers; otherwise one process holds the
whole model.

```
tezo-ds export --run runs/sst2 --merged models/sst2

deepspeed --num_gpus 8 --module -- tezo_ds export --run runs/sst2 --merged models/sst2 --dtype float32

tezo-ds export --run runs/sst2 --adapter models/sst2-lora

tezo-ds export --run runs/sst2 --adapter models/sst2-vllm --for vllm
```
"""

DTYPES = ("float32", "bfloat16", "float16")


@complete
@takes(Settings, only=("fsdp",))
def export(
    run: Annotated[Path | None, typer.Option(help="folder of the run")] = None,
    merged: Annotated[
        Path | None, typer.Option(help="folder to write for transformers' from_pretrained")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="folder to write for peft's from_pretrained")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="server that will read the adapter: vllm (ranks are padded to the next that it allows) or "
            "llama.cpp; unset: peft",
        ),
    ] = None,
    embeddings: Annotated[
        bool,
        typer.Option(
            "--embeddings",
            help="with --for: let the adapter have pairs of embeddings, if those have learnt",
        ),
    ] = False,
    deepspeed: Annotated[
        Path | None,
        typer.Option(
            help="DeepSpeed JSON with a tezo block, to shard in another way than the run did"
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="dtype of the merged weights: float32, bfloat16 or float16; unset: that of the run. float32 "
            "keeps what bfloat16 would round away of a small update"
        ),
    ] = None,
    **given: Any,
) -> None:
    """Exports a run's result; see EXPORT_HELP."""
    with uncollected():
        from tezo_ds.cli import accelerate
        from tezo_ds.export.adapter import no_adapter_because, not_low_rank, refuse_server, to_know
        from tezo_ds.export.beside import refuse_merged
        from tezo_ds.export.merged import refuse_filled
        from tezo_ds.export.output_layer import not_in_merged
        from tezo_ds.export.servers import SERVERS
        from tezo_ds.quiet import without_bars
        from tezo_ds.run.card import model_card
        from tezo_ds.run.changed import refuse_changed_weights
        from tezo_ds.run.results import journal_of
        from tezo_ds.training import session
        from tezo_ds.training.display import Display

    if run is None:
        raise ConfigError("--run is missing; name the folder of a run, e.g. runs/first")
    if merged is None and adapter is None:
        raise ConfigError("--merged or --adapter is missing; name a folder to write")
    if merged == adapter:
        raise ConfigError(f"--merged and --adapter both name {merged}; choose two folders")
    if server not in (None, *SERVERS):
        raise ConfigError(f"--for: must be one of {', '.join(SERVERS)} (got {server!r})")
    if (server or embeddings) and (adapter is None or server is None):
        raise ConfigError(
            "--for and --embeddings are of an --adapter; give --adapter FOLDER --for SERVER"
        )
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"--dtype: must be one of {', '.join(DTYPES)} (got {dtype!r})")
    for folder in filter(None, (merged, adapter)):
        refuse_filled(folder)
    launched = accelerate.launched()
    fsdp = launched.settings.get("fsdp") if given["fsdp"] is None else given["fsdp"]
    finished = session.open_result(run, deepspeed or launched.deepspeed, fsdp)
    settings, config, result = finished.settings, finished.config, finished.result
    if merged is not None:
        refuse_merged(config, "--merged")
    if adapter is not None and (reason := not_low_rank(config)):
        raise ConfigError(reason)
    steps = len(journal_of(run, config).steps)
    settings.fsdp_replicas = 1  # all ranks share the one copy
    _, deepspeed_config = session.resolve_config(finished.deepspeed, fsdp=settings.fsdp)
    without_bars()
    engine = session.open_engine(settings, config, deepspeed_config, result.ranks)
    if result.model is None:
        refuse_changed_weights(run, settings.model)
    sharding = engine.sharding
    display = Display(sharding.rank, sharding.world_size, log_every=1)
    kind = type(sharding).__name__
    display.note(f"weights       {kind} on {sharding.world_size} rank(s), {sharding.device}")
    result.give(engine, display)
    if adapter is not None:
        if reason := no_adapter_because(engine):
            raise ConfigError(reason)
        if server is not None:
            refuse_server(engine, server, embeddings)
        warning = to_know(engine)
        card = model_card(run, steps, adapter=True, warning=warning)
        _export_adapter(
            engine, adapter, settings, finished.base_model, card, display, server, embeddings
        )
        if warning:
            display.note(f"warning: {warning}")
    if merged is not None:
        warning = not_in_merged(engine)
        card = model_card(run, steps, adapter=False, warning=warning)
        if warning:
            display.note(f"warning: the merged model: {warning}")
        export_merged(engine, merged, settings, finished.base_model, dtype, card, display)


def _export_adapter(
    engine: Engine, folder: Path, settings: Settings, base_model: str, card: str, display: Display,
    server: str | None, embeddings: bool,
) -> None:  # fmt: skip
    from tezo_ds.export.adapter import save_adapter
    from tezo_ds.export.servers import how_to_serve
    from tezo_ds.files.text import read_json, writing
    from tezo_ds.models.loading import load_tokenizer

    tokenizer = load_tokenizer(base_model, pad=False, trust=settings.trust_remote_code)
    if engine.sharding.rank == 0:
        with writing(folder):
            save_adapter(engine, folder, base_model, card, tokenizer, server, embeddings)
    display.note(f"adapter       {folder}")
    if server is not None and engine.sharding.rank == 0:
        rank = read_json(folder / "adapter_config.json")["r"]
        display.note(f"to serve      {how_to_serve(server, str(folder), base_model, rank)}")


def export_merged(
    engine: Engine, folder: Path, settings: Settings, base_model: str, dtype: str | None, card: str,
    display: Display,
) -> None:  # fmt: skip
    """Writes a merged model and says so; all ranks call this."""
    import torch

    from tezo_ds.export.merged import save_merged
    from tezo_ds.models.loading import load_tokenizer
    from tezo_ds.training.interrupts import Interrupted, turned_into_exceptions

    tokenizer = load_tokenizer(base_model, pad=False, trust=settings.trust_remote_code)
    written = None if dtype is None else getattr(torch, dtype)
    try:
        with turned_into_exceptions(), display.evaluation(f"writing {folder}") as progress:
            save_merged(engine, folder, tokenizer, written, progress, card)
    except Interrupted as signalled:
        signalled.left = f"nothing is left in {folder}"
        raise
    display.note(f"merged model  {folder}")
