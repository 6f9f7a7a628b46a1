"""Terms of the output layer in a run's folder: a small file for each fit.

A file names the journal that it is of by the checksum of the last line before the fit, as a snapshot does,
and the line of the step after the fit has the file's digest. So a fit counts with the step after it, and
one at the end of a run with the run's summary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.errors import StorageError
from tezo_ds.files.tensors import digest, load, save
from tezo_ds.output_layer.term import BIAS, due_by, moved
from tezo_ds.run.folder import OUTPUT_LAYER, RunFolder

Terms = dict[int, dict[str, Tensor]]  # by the number of steps before the fit


def path_of(run: Path, done: int) -> Path:
    """Returns the file of the fit after `done` steps."""
    return run / OUTPUT_LAYER / f"step-{done:08d}.safetensors"


def save_term(folder: RunFolder, done: int, term: Mapping[str, Tensor]) -> None:
    """Writes the file of the fit after `done` steps, all of which are in the journal.

    Raises:
        StorageError: the file cannot be written.
    """
    save(term, path_of(folder.path, done), {"step": str(done), "sum": folder.sum})


def terms_of(
    run: Path, config: TezoConfig, header: Mapping[str, Any], steps: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
) -> Terms:  # fmt: skip
    """Reads all terms that a run's steps had, and the one that was fitted after the last step, if any was.

    Args:
        run: the run's folder.
        config: the run's config.
        header: the journal's header.
        steps: lines of the journal.
        summary: content of summary.json, {} where there is none.

    Raises:
        StorageError: a file is missing or damaged, or not the one that the run had.
    """
    if config.output_layer == "frozen":
        return {}
    field = "output_layer"
    terms = {x["step"]: _read(run, x["step"], str(x[field])) for x in steps if field in x}
    done = len(steps)
    if due_by(config, done) != done:
        return terms
    ended = summary.get(field) if summary.get("status") == "finished" else None
    if isinstance(ended, dict) and ended.get("after_steps") == done:
        terms[done] = _read(run, done, str(ended.get("digest")))
    elif path_of(run, done).exists():
        try:
            term, about = load(path_of(run, done))
        except StorageError as error:  # no step rests on it yet
            raise StorageError(f"{error}, or remove it, and it is fitted again") from None
        if about.get("sum") == (steps[-1] if steps else header)["sum"]:
            terms[done] = term
    return terms


def last_term(terms: Terms, steps: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Returns the term after the last of some steps, from the first on: that of the last fit, with its biases
    as steps that solve have moved them since; {} where there is none.

    Args:
        terms: of `terms_of`.
        steps: lines of the journal.
    """
    term: dict[str, Tensor] = {}
    for line in steps:
        term = terms.get(line["step"], term)
        if not term or "solved" not in line:
            continue
        columns = torch.tensor(line["solved"], dtype=torch.float64)
        if len(columns) - len(line["kappa"]) == len(term[BIAS]):  # and not directions alone
            term = moved(term, -line["lr"] * columns[-len(term[BIAS]) :])
    return terms.get(len(steps), term)


def _read(run: Path, done: int, expected: str) -> dict[str, Tensor]:
    path = path_of(run, done)
    if not path.exists():
        raise StorageError(
            f"{path} is missing: the output layer as it was after {done} steps, which other steps rest on; "
            "take it from a copy, or choose another --output"
        )
    term, _ = load(path)
    if digest(term) != expected:
        raise StorageError(
            f"{path}: is not the output layer that the run had after {done} steps; take it from a copy, or "
            "choose another --output"
        )
    return term
