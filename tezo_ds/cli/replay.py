"""The command `tezo-ds replay`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tezo_ds.cli.imports import uncollected
from tezo_ds.errors import ConfigError, StorageError

if TYPE_CHECKING:  # what takes seconds to import is imported late, as --help need not wait for it
    from tezo_ds.engine.engine import Engine
    from tezo_ds.run.terms import Terms
    from tezo_ds.training.display import Display

REPLAY_HELP = """Rebuild a run's result from its journal, in one process, without forward passes.

Coefficients follow from the journal and the model's shapes alone; weights that a run wrote take the base
model, too. --verify compares the state that is equal on all ranks with the digests that the run left in its
journal every --check-every steps; for tezo, tezo-m and tezo-adam-coef that state is the whole result.

```
tezo-ds replay runs/sst2 --verify

tezo-ds replay runs/sst2 --to-step 1000 --coefficients after-1000.safetensors

tezo-ds replay runs/sst2 --to-step 1000 --merged models/sst2-1000
```
"""


def replay(
    run: Annotated[Path, typer.Argument(help="folder of the run")],
    to_step: Annotated[
        int | None,
        typer.Option(min=0, help="step after which to stop; unset: the last one in the journal"),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="compare with the digests that the run left in its journal"),
    ] = False,
    coefficients: Annotated[
        Path | None, typer.Option(help="safetensors file to write the coefficients to")
    ] = None,
    merged: Annotated[
        Path | None, typer.Option(help="folder to write for transformers' from_pretrained")
    ] = None,
) -> None:
    """Rebuilds a run's result; see REPLAY_HELP."""
    with uncollected():
        from tezo_ds.cli.export import export_merged
        from tezo_ds.export.beside import refuse_merged
        from tezo_ds.export.merged import refuse_filled
        from tezo_ds.export.output_layer import not_in_merged
        from tezo_ds.models.loading import load_skeleton
        from tezo_ds.quiet import without_bars
        from tezo_ds.run.about import read_run
        from tezo_ds.run.card import model_card
        from tezo_ds.run.changed import refuse_changed_weights
        from tezo_ds.run.folder import JOURNAL
        from tezo_ds.run.results import journal_of, ranks_of, read_terms
        from tezo_ds.sharding import sharding_of
        from tezo_ds.training import session
        from tezo_ds.training.display import Display

    if not verify and coefficients is None and merged is None:
        raise ConfigError("nothing to do: add --verify, --coefficients FILE or --merged FOLDER")
    if merged is not None:
        refuse_filled(merged)
    settings, config = read_run(run)
    if merged is not None:
        refuse_merged(config, "--merged")
    settings.fsdp = False  # one process holds it whole
    if coefficients is not None and not config.facts.learns_coefficients:
        raise ConfigError(f"--coefficients: {config.method} learns weights; use --merged FOLDER")
    contents = journal_of(run, config)
    if to_step is not None and to_step > len(contents.steps):
        raise ConfigError(f"--to-step {to_step}: {run / JOURNAL} has {len(contents.steps)} steps")
    steps = contents.steps[:to_step]
    without_bars()
    display = Display(0, 1, log_every=1)
    if contents.torn:
        display.note(f"{JOURNAL}: {contents.torn}; left out")
    writes = merged is not None or config.writes_periods or not config.facts.learns_coefficients
    if writes:
        engine = session.open_engine(settings, config, None, ranks_of(run, config))
        refuse_changed_weights(run, settings.model)
    else:
        model = load_skeleton(settings.model, settings.dtype, settings.trust_remote_code)
        engine = session.engine_for(settings, config, sharding_of(model), ranks_of(run, config))
    _replay(engine, steps, read_terms(run, config), verify, run, display)
    if coefficients is not None:
        _save(engine, coefficients, display)
    if merged is not None:
        card = model_card(run, engine.step_index, adapter=False, warning=not_in_merged(engine))
        export_merged(engine, merged, settings, settings.model, None, card, display)


def _replay(
    engine: Engine, steps: list[dict[str, Any]], terms: Terms, verify: bool, run: Path, display: Display
) -> None:  # fmt: skip
    from tezo_ds.files.tensors import digest
    from tezo_ds.run.folder import JOURNAL
    from tezo_ds.run.results import replay

    compared = 0

    def compare(line: dict[str, Any]) -> None:
        nonlocal compared
        if verify and "state" in line:
            if digest(engine.state()) != line["state"]:
                raise StorageError(
                    f"{run / JOURNAL}: after step {line['step']} the replay is not what the run had; it is "
                    "of another model, or of another version of tezo_ds"
                )
            compared += 1

    replay(engine, steps, display, compare, terms)
    if verify and not compared:
        raise ConfigError(
            f"{run / JOURNAL} has no digest in these {len(steps)} steps; the run makes them every "
            f"--check-every steps ({engine.config.check_every})"
        )
    if verify:
        display.note(f"{compared} digests agree")


def _save(engine: Engine, path: Path, display: Display) -> None:
    from tezo_ds.export.coefficients import save_coefficients

    save_coefficients(engine.coefficients(), path, engine.config.identity)
    display.note(f"coefficients  {path}")
