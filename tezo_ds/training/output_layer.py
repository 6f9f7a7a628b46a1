"""The output layer of a run, fitted in closed form: when, to which examples, and what is said of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tezo_ds.config.block import AUTO
from tezo_ds.errors import ConfigError
from tezo_ds.files.tensors import digest
from tezo_ds.output_layer.answering import refuse_unfit as refuse_no_inner
from tezo_ds.output_layer.choosing import FOLD
from tezo_ds.output_layer.entry import Late
from tezo_ds.output_layer.fit import Choice, Fitted, again, choice, gain
from tezo_ds.output_layer.inner import InnerLayer, tensors_of
from tezo_ds.output_layer.language import fit_tokens
from tezo_ds.output_layer.problem import States
from tezo_ds.output_layer.states import Batches, collect, collect_tokens
from tezo_ds.output_layer.term import due_by, term_of
from tezo_ds.run.folder import RunFolder
from tezo_ds.run.terms import save_term
from tezo_ds.tasks.batches import PIECE, batch_indices, lane_places, longest_first, shard_range
from tezo_ds.tasks.encoded import Encoded, collate, labels_of
from tezo_ds.tasks.lazy import pick
from tezo_ds.training.display import Display
from tezo_ds.training.session import Session
from tezo_ds.trunk.trunk import EXAMPLE_IDS


def refuse_unfit(session: Session, saves: bool) -> None:
    """Raises ConfigError if the run is to fit an output layer and cannot; `saves`: whether it merges in the
    end."""
    engine = session.engine
    if engine.config.output_layer == "frozen":
        return
    engine.output_layer.refuse_unfit()
    if engine.config.inner_layers != "none":
        if session.words is None:
            raise ConfigError(
                "inner_layers: need label words that alone count in the loss; add --objective choices, or "
                "leave inner_layers off"
            )
        refuse_no_inner(engine.objective)
        engine.output_layer.inner.of_blocks(engine.config.inner_layers, engine.config.inner_maps)
    if saves and (reason := engine.output_layer.unmergeable()):
        raise ConfigError(f"{reason}, or add --no-save-model")
    if len(session.task.train) < FOLD:
        raise ConfigError(
            f"output_layer: a fit needs {FOLD} training examples at least, got {len(session.task.train)}; "
            "leave it frozen"
        )


def _terms(
    inner: Sequence[InnerLayer], pairs: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Returns the terms of all inner layers by name, or {} where there are none."""
    return tensors_of([each.path for each in inner], pairs) if pairs else {}


def _better(without: Choice, found: Choice) -> bool:
    """Returns whether a fit with inner layers is better than one without, by more than the standard error."""
    better, error = gain(without, found)
    return better > error


class OutputLayerFits:
    """Fits of a run, one after every so many steps.

    Attributes:
        found: what the summary says of the last fit; None before the first.
    """

    def __init__(
        self, session: Session, examples: Sequence[Encoded], folder: RunFolder | None, display: Display,
        batch_size: int,
    ) -> None:  # fmt: skip
        self._session, self._examples, self._batch_size = session, examples, batch_size
        self._folder, self._display = folder, display
        self._engine = session.engine
        self.found: dict[str, Any] | None = None
        self._kept: int | None = None  # steps before a fit that was made by an earlier process

    def go_on(self, fitted: int | None, found: dict[str, Any] | None = None) -> None:
        """Takes the term that the engine was given when the run went on, fitted after so many steps, and what
        `found` says of it, if that is known."""
        if fitted is not None:
            self._kept = fitted
            self.found = found or {
                "after_steps": fitted,
                "digest": digest(self._engine.output_layer.state),
            }

    def field(self, step: int) -> dict[str, str]:
        """Returns what the journal's line of a step says of a fit right before it."""
        found = self.found
        return {"output_layer": found["digest"]} if found and found["after_steps"] == step else {}

    def fit_if_due(self) -> bool:
        """Fits the term where one is due after the steps so far, and is not there; returns whether it did.

        All ranks must call this.

        Raises:
            TezoError: the model's output layer cannot have a term, replicas differ, or a disk is full.
        """
        engine = self._engine
        done, config = engine.step_index, engine.config
        if config.output_layer == "frozen" or due_by(config, done) != done or self._kept == done:
            return False
        start = time.perf_counter()
        fitted, inner, nbytes = self._fitted()
        term = {**term_of(self._words, fitted), **inner}
        engine.output_layer.load(term)
        engine.check()
        if self._folder is not None:
            save_term(self._folder, done, term)
        self._tell(done, nbytes, fitted, digest(term), time.perf_counter() - start)
        return True

    def _tell(self, done: int, nbytes: int, fitted: Fitted, digested: str, seconds: float) -> None:
        before, after, count = fitted.before, fitted.after, self._count
        self.found = {
            "after_steps": done, "digest": digested, "examples": count, "states": fitted.examples,
            "words": len(fitted.bias), "ridge": fitted.strength, "held_out_loss_before": before.loss,
            "held_out_loss_after": after.loss, "held_out_accuracy_before": before.accuracy,
            "held_out_accuracy_after": after.accuracy, "bytes_of_states": nbytes,
            "messages": fitted.messages, "message_bytes": fitted.message_bytes,
            "seconds": round(seconds, 2),
        }  # fmt: skip
        what = f"{count} examples"
        if fitted.basis is not None:
            self.found["rank"] = rank = len(fitted.basis)
            by_rank = f", rank {rank}" if rank else ""
            what = f"{fitted.examples:,} labels of {what}, {len(fitted.bias):,} words{by_rank}"
        if self._engine.config.inner_layers != "none":
            paths = [inner.path for inner in self._engine.output_layer.inner.with_terms]
            self.found["inner_layers"] = paths
            what += f", with a term of {' and '.join(paths) or 'no inner layer'}"
        ridge = "" if fitted.strength is None else f", λ {fitted.strength:.3g}"
        ranks = self._engine.sharding.world_size
        sent = f", {fitted.messages} messages of {fitted.message_bytes:,} bytes at most"
        self._display.note(
            f"output layer: {self._engine.config.output_layer} to {what}{ridge}; of the "
            f"fifth held out loss {before.loss:.4f} → {after.loss:.4f}, accuracy {before.accuracy:.1%} → "
            f"{after.accuracy:.1%}; {seconds:.1f} s, {nbytes:,} bytes of states a rank"
            f"{sent if ranks > 1 else ''}"
        )

    @cached_property
    def _words(self) -> Tensor:
        """The words of the term: the task's, or in ascending order the tokens that are labels of the examples
        that it is fitted to."""
        if self._session.words is not None:
            return self._session.words
        order = batch_indices(len(self._examples), self._count, 0, self._engine.config.seed, 0, 1)
        chosen = (self._examples[i] for i in order)
        return torch.tensor(sorted({token for e in chosen for token in labels_of(e)}))

    def _reduce(self, part: Tensor) -> Tensor:
        return self._engine.sharding.all_reduce(part)

    def _fitted(self) -> tuple[Fitted, dict[str, Tensor], int]:
        """Fits to states at the present weights and coefficients, without the term; returns the terms of
        inner layers, as `InnerLayers.state` has them, and the bytes of this rank's states, too."""
        engine, words, batches = self._engine, self._words, self.batches()
        objective, config, layer = engine.objective, engine.config, engine.output_layer.layer
        assert layer is not None, "refused before"
        alone = config.output_layer == "bias"
        inner = engine.output_layer.inner.of_blocks(config.inner_layers, config.inner_maps)
        late = Late()
        with engine.applied(), engine.output_layer.off():
            if self._session.words is not None:
                states = collect(objective, layer, batches, words, inner, late)
            else:
                tokens = collect_tokens(objective, layer, batches, words)
        if self._session.words is not None:
            fitted = self._best(states, alone, inner, late)
            terms = _terms(inner, fitted.inner)
            if terms:
                # The first fit only foresees the states that they give, and as if ΔW were zero. λ stays, as
                # by now the examples that are held out have had a part in A.
                fitted = again(self._with(terms, late), fitted, self._reduce)
            return fitted, terms, states.nbytes + late.nbytes
        rank = 0 if alone else config.output_layer_rank
        return fit_tokens(tokens, rank, self._reduce), {}, tokens.nbytes

    def _with(self, terms: dict[str, Tensor], late: Late) -> States:
        """Returns states that inner layers' terms give, of the examples that `late` knows."""
        engine, layer = self._engine, self._engine.output_layer.layer
        assert layer is not None, "refused before"
        engine.output_layer.load(terms)
        with engine.applied():
            return collect(engine.objective, layer, self.batches(), self._words, late=late)

    def _best(self, states: States, alone: bool, inner: Sequence[InnerLayer], late: Late) -> Fitted:
        """Returns the fit, with the terms of all inner layers; but with `auto` of none unless they lower the
        loss of the examples that are held out by more than its standard error, foreseen and measured."""
        found = choice(states, alone, self._reduce)
        if self._engine.config.inner_layers != AUTO:
            return found.fitted()
        without = choice(replace(states, inner=()), alone, self._reduce)
        if not _better(without, found):  # as much as chance would give
            return without.fitted()
        measured = found.measured(self._with(_terms(inner, found.inner), late), self._reduce)
        if not _better(without, measured):
            return without.fitted()
        return replace(found.fitted(), after=measured.after)

    @property
    def _count(self) -> int:
        """Number of examples that the term is fitted to, over all ranks."""
        total = len(self._examples)
        return min(total, self._engine.config.output_layer_examples or total)

    @property
    def filled(self) -> bool:
        """Whether a fit of an earlier process was the first to fill the trunk's cache."""
        return self._kept is not None

    def batches(self) -> Batches:
        """Yields this rank's examples of those that begin the first epoch, and which are held out; of some
        batches' examples at a time the longest first, so that little is padding. With a trunk cache each is
        on the rank whose steps have it."""
        engine, size, n = self._engine, self._session.settings.eval_batch_size, self._count
        config, sharding = engine.config, engine.sharding
        order = batch_indices(len(self._examples), n, 0, config.seed, 0, 1)
        cached, lanes = config.trunk_cache != "off", self._batch_size
        shares = [
            list(lane_places(n, lanes, rank, sharding.world_size))
            if cached
            else list(shard_range(n, rank, sharding.world_size))
            for rank in range(sharding.world_size)
        ]
        alike = self._alike(shares[sharding.rank], order, size)
        for _ in range(0, max(map(len, shares)), size):
            places, sequences = next(alike, ([], []))
            batch = collate(sequences, self._session.pad_id, filler=self._examples[0])
            if cached:
                batch[EXAMPLE_IDS] = torch.tensor([order[place] for place in places] or [0])
            yield batch, torch.tensor(places or [0]) % FOLD == FOLD - 1

    def _alike(
        self, mine: Sequence[int], order: Sequence[int], size: int
    ) -> Iterator[tuple[list[int], list[Encoded]]]:
        """Yields places of this rank in batches of like lengths, and the sequences there."""
        for first in range(0, len(mine), PIECE * size):
            places = mine[first : first + PIECE * size]
            found = pick(self._examples, [order[place] for place in places])
            sorted_ = longest_first([len(each.input_ids) for each in found])
            for start in range(0, len(places), size):
                chosen = sorted_[start : start + size]
                yield [places[i] for i in chosen], [found[i] for i in chosen]
