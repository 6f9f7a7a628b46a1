"""The output layer of a run, fitted in closed form: when, to which examples, and what is said of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tezo_ds.errors import ConfigError
from tezo_ds.files.tensors import digest
from tezo_ds.output_layer.fit import FOLD, Fitted, States, fit
from tezo_ds.output_layer.states import collect
from tezo_ds.output_layer.term import BIAS, TOKENS, WEIGHT, due_by
from tezo_ds.run.folder import RunFolder
from tezo_ds.run.terms import save_term
from tezo_ds.tasks.batches import batch_indices, rounds
from tezo_ds.tasks.encoding import Encoded, collate
from tezo_ds.training.display import Display
from tezo_ds.training.session import Session


def refuse_unfit(session: Session, saves: bool) -> None:
    """Raises ConfigError if the run is to fit an output layer and cannot; `saves`: whether it merges in the
    end."""
    engine = session.engine
    if engine.config.output_layer == "frozen":
        return
    engine.output_layer.refuse_unfit()
    if saves and (reason := engine.output_layer.unmergeable()):
        raise ConfigError(f"{reason}, or add --no-save-model")
    if len(session.task.train) < FOLD:
        raise ConfigError(
            f"output_layer: a fit needs {FOLD} training examples at least, got {len(session.task.train)}; "
            "leave it frozen"
        )


class OutputLayerFits:
    """Fits of a run, one after every so many steps.

    Attributes:
        found: what the summary says of the last fit; None before the first.
    """

    def __init__(
        self, session: Session, examples: Sequence[Encoded], folder: RunFolder | None, display: Display
    ) -> None:  # fmt: skip
        self._session, self._examples = session, examples
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
        states = self._states()
        fitted = fit(states, config.output_layer == "bias", self._reduce)
        term = {TOKENS: self._words.cpu(), WEIGHT: fitted.weight, BIAS: fitted.bias}
        engine.output_layer.load(term)
        engine.check()
        if self._folder is not None:
            save_term(self._folder, done, term)
        self._tell(done, states, fitted, digest(term), time.perf_counter() - start)
        return True

    def _tell(
        self, done: int, states: States, fitted: Fitted, digested: str, seconds: float
    ) -> None:
        before, after = fitted.before, fitted.after
        self.found = {
            "after_steps": done, "digest": digested, "examples": fitted.examples,
            "ridge": fitted.strength, "held_out_loss_before": before.loss,
            "held_out_loss_after": after.loss, "held_out_accuracy_before": before.accuracy,
            "held_out_accuracy_after": after.accuracy, "seconds": round(seconds, 2),
        }  # fmt: skip
        ridge = "" if fitted.strength is None else f", λ {fitted.strength:.3g}"
        ranks = self._engine.sharding.world_size
        sent = f", {fitted.messages} messages of {fitted.message_bytes:,} bytes at most"
        self._display.note(
            f"output layer: {self._engine.config.output_layer} to {fitted.examples} examples{ridge}; of the "
            f"fifth held out loss {before.loss:.4f} → {after.loss:.4f}, accuracy {before.accuracy:.1%} → "
            f"{after.accuracy:.1%}; {seconds:.1f} s, {states.nbytes:,} bytes of states a rank"
            f"{sent if ranks > 1 else ''}"
        )

    @property
    def _words(self) -> Tensor:
        assert self._session.words is not None, "the session's own check"
        return self._session.words

    def _reduce(self, part: Tensor) -> Tensor:
        return self._engine.sharding.all_reduce(part)

    def _states(self) -> States:
        """Collects this rank's states at the present weights and coefficients, without the term."""
        engine, trunk = self._engine, self._engine.objective.trunk
        layer = engine.output_layer.layer
        assert layer is not None, "refused before"
        with engine.applied(), engine.output_layer.off():
            if trunk is None:
                return collect(engine.objective, layer, self._batches(), self._words)
            with trunk.using(None):  # as one of the examples' other places in the cache
                return collect(engine.objective, layer, self._batches(), self._words)

    def _batches(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yields this rank's examples in the order of the first epoch, and which are held out."""
        engine, size = self._engine, self._session.settings.eval_batch_size
        config, sharding = engine.config, engine.sharding
        n = min(len(self._examples), config.output_layer_examples or len(self._examples))
        rank, world = sharding.rank, sharding.world_size
        mine = batch_indices(len(self._examples), n, 0, config.seed, rank, world)
        first = n * rank // world  # place of this rank's first example
        for index in range(rounds(n, size, world)):
            part = mine[index * size : (index + 1) * size]
            batch = collate(
                [self._examples[i] for i in part], self._session.pad_id, filler=self._examples[0]
            )
            places = first + index * size + torch.arange(max(1, len(part)))
            yield batch, places % FOLD == FOLD - 1
