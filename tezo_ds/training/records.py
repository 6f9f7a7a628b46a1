"""What rank 0 writes into a run's folder of a step and at the end, whichever loop has made the steps."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import PreTrainedTokenizerBase

from tezo_ds.engine.engine import Engine
from tezo_ds.errors import StorageError
from tezo_ds.export.adapter import save_adapter, to_know
from tezo_ds.export.coefficients import save_coefficients
from tezo_ds.files.tensors import digest
from tezo_ds.run.card import model_card
from tezo_ds.run.curve import draw_curve
from tezo_ds.run.folder import ADAPTER, COEFFICIENTS, CURVE, METRICS, REPORT, SUMMARY, RunFolder
from tezo_ds.run.page import page_of
from tezo_ds.training.display import Display


def of_journal(engine: Engine) -> dict[str, Any]:
    """Returns the fields of a step's line in the journal besides those of its report: a digest of what is
    equal on all ranks, every so many steps, and the cost of a forward."""
    every = engine.config.check_every
    fields: dict[str, Any] = {}
    if every and engine.step_index % every == 0:
        fields["state"] = digest(engine.state())
    if engine.run_state.cost is not None:
        fields["cost"] = asdict(engine.run_state.cost)
    return fields


def write_results(
    engine: Engine, model: str, tokenizer: PreTrainedTokenizerBase | None, folder: RunFolder,
    summary: dict[str, Any], display: Display,
) -> None:  # fmt: skip
    """Writes the results; what only shows them or repeats them may fail, and the rest is still written."""
    folder.close()
    if engine.config.facts.learns_coefficients:
        save_coefficients(engine.coefficients(), folder.path / COEFFICIENTS, engine.config.identity)
        try:
            warning = to_know(engine)
            card = model_card(folder.path, engine.step_index, adapter=True, warning=warning)
            save_adapter(engine, folder.path / ADAPTER, model, card, tokenizer)
            if warning:
                summary["adapter_warning"] = warning
        except StorageError:
            raise
        except Exception as error:  # trained something that LoRA has no place for, or a library's
            summary["adapter"] = str(error) or type(error).__name__
    if engine.step_index:
        try:
            draw_curve(folder.path / METRICS, folder.path / CURVE)
        except Exception as error:  # of matplotlib, whose settings are the user's
            display.note(f"no {CURVE}: {type(error).__name__}: {error}".split("\n")[0])
    try:
        page = page_of(folder.path, summary, str(engine.sharding.device))
        (folder.path / REPORT).write_text(page, encoding="utf-8")
    except Exception as error:  # of a folder that was changed under the run; its results are there
        display.note(f"no {REPORT}: {type(error).__name__}: {error}".split("\n")[0])
    folder.write_json(SUMMARY, summary)  # last, as a run that has it may count as finished
