"""A run's result in its folder, and how an engine gets there: by loading coefficients, by starting from the
merged model, or by replaying the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tezo_ds.config import TezoConfig
from tezo_ds.engine.engine import Engine
from tezo_ds.errors import ConfigError, StorageError
from tezo_ds.export.merged import is_complete
from tezo_ds.files.tensors import digest, read
from tezo_ds.files.text import read_json
from tezo_ds.run.folder import COEFFICIENTS, CONFIG, JOURNAL, MODEL, SUMMARY
from tezo_ds.run.journal import Contents, read_journal
from tezo_ds.run.terms import Terms, last_term, terms_of


class Display(Protocol):
    """Receiver of notices and progress: `training.display.Display`, or a stand-in of a test or benchmark."""

    def note(self, text: str) -> None:
        """Shows a line to the user."""

    def evaluation(self, label: str) -> AbstractContextManager[Callable[[float], None] | None]:
        """Context manager: gives a function that takes the fraction done, or None where none is shown."""


@dataclass(frozen=True)
class Result:
    """How to rebuild a run's result: from coefficients, a merged model, or the journal.

    Attributes:
        coefficients: tensors by parameter name, as of `Engine.coefficients`.
        model: folder of the merged model, to be loaded in place of the base model; then nothing is left
            to do.
        steps: lines of the journal, from the first step on.
        ranks: rank of each matrix, where the run chose ranks itself.
        terms: terms of the output layer, by the steps before each fit.
        term: the one at the end.
    """

    coefficients: dict[str, Tensor] = field(default_factory=dict)
    model: Path | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)
    ranks: dict[str, int] | None = None
    terms: Terms = field(default_factory=dict)
    term: dict[str, Tensor] = field(default_factory=dict)

    @property
    def writes(self) -> bool:
        """Whether `give` writes weights, which then have to be of the dtype that the run's shards had."""
        return bool(self.steps) or any(part.dim() == 2 for part in self.coefficients.values())

    def give(self, engine: Engine, display: Display) -> None:
        """Brings a new engine to the run's result. All ranks must call this.

        Raises:
            TezoError: the result is of another model.
        """
        if self.coefficients:
            engine.load_coefficients(self.coefficients)
        if not self.steps:
            engine.output_layer.load(self.term)
            return
        replay(engine, self.steps, display, terms=self.terms)
        engine.check()  # ranks may have read the file of a run that still goes on


def replay(
    engine: Engine, steps: Sequence[dict[str, Any]], display: Display,
    after: Callable[[dict[str, Any]], None] | None = None, terms: Terms | None = None,
) -> None:  # fmt: skip
    """Replays the lines of a journal on an engine, each with its term of the output layer, and calls `after`
    with each; the engine has the last term in the end, one that was fitted after the last step included."""
    display.note(f"replaying {len(steps)} steps of {JOURNAL}")
    with display.evaluation("replaying") as progress:
        for done, line in enumerate(steps, start=1):
            give_fitted(engine, terms or {})
            engine.replay(line["step"], line["kappa"], line["lr"], line["rho"], line.get("solved"))
            if after is not None:
                after(line)
            if progress is not None:
                progress(done / len(steps))
    give_fitted(engine, terms or {})


def give_fitted(engine: Engine, terms: Terms) -> None:
    """Gives an engine the term that was fitted right after the steps that it has made, if one was."""
    if engine.step_index in terms:
        engine.output_layer.load(terms[engine.step_index])


def read_result(folder: Path, config: TezoConfig, base: bool = False) -> Result:
    """Reads the result of a run, in the most exact form that its folder has.

    Args:
        folder: the run's folder.
        config: the run's config.
        base: whether to put the result on the base model, and not use the run's merged model.

    Raises:
        ConfigError: there is no result. StorageError: the result's file is damaged, or another run's.
    """
    ranks, (terms, term) = ranks_of(folder, config), _terms_and_last(folder, config)
    path = folder / COEFFICIENTS
    if config.facts.learns_coefficients and path.exists():
        return Result(_coefficients(path, config), ranks=ranks, term=term)
    merged = is_complete(folder / MODEL) and not terms  # whose biases a model has no place for
    if merged and not base:
        return Result(model=folder / MODEL, ranks=ranks)
    if not (folder / JOURNAL).exists():
        raise ConfigError(f"{path} does not exist, and no {JOURNAL} either; is it a run folder?")
    return Result(steps=_steps(folder, config), ranks=ranks, terms=terms)


def read_terms(folder: Path, config: TezoConfig) -> Terms:
    """Reads the terms of the output layer that a run had, by the steps before each fit.

    Raises:
        StorageError: a file is missing or damaged.
    """
    return _terms_and_last(folder, config)[0]


def _terms_and_last(folder: Path, config: TezoConfig) -> tuple[Terms, dict[str, Tensor]]:
    if config.output_layer == "frozen":
        return {}, {}
    summary = read_json(folder / SUMMARY) if (folder / SUMMARY).exists() else {}
    contents = journal_of(folder, config)
    terms = terms_of(folder, config, contents.header or {}, contents.steps, summary)
    return terms, last_term(terms, contents.steps)


def _coefficients(path: Path, config: TezoConfig) -> dict[str, Tensor]:
    tensors, about = read(path)
    refuse_foreign(path, about, config)
    if "digest" in about and about["digest"] != digest(tensors):
        raise StorageError(f"{path}: does not have its checksum; take it from a copy")
    return tensors


def refuse_foreign(path: Path, about: Mapping[str, Any], config: TezoConfig) -> None:
    """Raises StorageError unless a file's metadata is of a run with this config."""
    if about.get("run", config.identity) != config.identity:
        raise StorageError(
            f"{path}: is of a run that was configured otherwise than {CONFIG} says; take both from a copy"
        )


def journal_of(folder: Path, config: TezoConfig) -> Contents:
    """Reads the journal of a run folder, see `read_journal`.

    Raises:
        StorageError: the journal is damaged, or of a run with another config.
    """
    contents = read_journal(folder / JOURNAL)
    refuse_foreign(folder / JOURNAL, contents.header or {}, config)
    return contents


def _steps(folder: Path, config: TezoConfig) -> list[dict[str, Any]]:
    """Reads the journal's steps; raises StorageError if the run's summary, if there is one, counts more."""
    path = folder / JOURNAL
    steps = journal_of(folder, config).steps
    summary = read_json(folder / SUMMARY) if (folder / SUMMARY).exists() else {}
    # A run that failed did so in the middle of a step that has no line, perhaps.
    had = len(steps) if summary.get("status") == "failed" else summary.get("steps", len(steps))
    if not isinstance(had, int):
        raise StorageError(f"{folder / SUMMARY}: steps is {had!r}; take the file from a copy")
    if len(steps) < had:
        raise StorageError(
            f"{path}: has {len(steps)} whole steps, and the run had {had}; take the file from a copy"
        )
    return steps


def ranks_of(folder: Path, config: TezoConfig) -> dict[str, int] | None:
    """Reads the rank of each matrix, where a run chose ranks, or matrices, itself; else returns None.

    Raises:
        ConfigError: the run's config.json does not have the ranks.
    """
    if config.rank != "auto" and not config.chooses:
        return None
    ranks = read_json(folder / CONFIG).get("ranks")
    if not isinstance(ranks, dict) or not all(isinstance(r, int) and r > 0 for r in ranks.values()):
        raise ConfigError(
            f'{folder / CONFIG}: "ranks" of a run of rank or include auto is missing or malformed'
        )
    return ranks


@torch.no_grad()
def gathered_in(engine: Engine, dtype: torch.dtype) -> None:
    """Adds what is kept aside to the weights of one process, then rounds them to what a run in mixed
    precision gathered from its shards."""
    engine.merge()
    for parameter in engine.sharding.module.parameters():
        parameter.data = parameter.data.to(dtype)
