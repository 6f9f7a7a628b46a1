"""The fit of a term in the middle of the model: which layer, from which forwards, and whether it stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tezo_ds.engine.engine import Engine
from tezo_ds.errors import ConfigError
from tezo_ds.losses.objective import IGNORE, targets
from tezo_ds.output_layer.fit import Fitted, States, fit
from tezo_ds.output_layer.inner_choice import Watch, candidates
from tezo_ds.output_layer.inner_responses import STEP, measure, solved
from tezo_ds.output_layer.inner_term import LAYER, LEFT, RIGHT, writer_of
from tezo_ds.output_layer.states import Batches, collect, rows_of
from tezo_ds.output_layer.totals import AllReduce
from tezo_ds.sharding.world import agreed

RESPONSES = 128  # examples, over all ranks, that responses are the mean of


def layers_to_watch(engine: Engine) -> list[int]:
    """Returns the layers that the fit may stand at.

    Raises:
        ConfigError: the model has no such layer.
    """
    layer = engine.config.inner_layer
    if layer == "auto":
        return candidates(engine.sharding)
    assert isinstance(layer, int), "there is one"
    writer_of(engine.sharding, layer)
    return [layer]


class InnerFit:
    """Fit of the inner term beside the output layer's.

    Attributes:
        found: what the summary says of it.

    Args:
        engine: whose coefficients are still those of the base model.
        words: token ids of the label words, int64 (C,).
        reduce: adds a tensor up over the ranks.
    """

    def __init__(self, engine: Engine, words: Tensor, reduce: AllReduce) -> None:
        self._engine, self._words, self._reduce = engine, words, reduce
        self.found: dict[str, Any] = {}

    def fitted(self, batches: Batches, few: Batches) -> tuple[Fitted, int]:
        """Fits the output layer without and with an inner term, and leaves the engine with the inner one if
        it does better on the examples that are held out. All ranks must call this.

        Args:
            batches: what can be run through several times: batch, and which examples are held out.
            few: the same, in batches of which a forward takes one for each word and one more.

        Returns:
            The better fit of the output layer, and bytes of this rank's states.
        """
        engine = self._engine
        watch = Watch(engine.sharding, layers_to_watch(engine))
        with engine.applied(), engine.output_layer.off():
            with watch.watching():
                plain = self._collected(self._kept(batches, watch))
            alone = fit(plain, False, self._reduce)
            term = self._term(watch, plain, few)
        engine.output_layer.inner.load(term)
        with engine.applied(), engine.output_layer.off(inner=False):
            both = fit(self._collected(batches), False, self._reduce)
        self.found |= {"inner_held_out_loss_without": alone.after.loss}
        if both.after.loss >= alone.after.loss:  # the same numbers on all ranks
            engine.output_layer.inner.load({})
            self.found |= {"inner_layer": None}
            return alone, plain.nbytes + watch.nbytes
        return both, plain.nbytes + watch.nbytes

    def _collected(self, batches: Batches) -> States:
        layer = self._engine.output_layer.layer
        assert layer is not None, "refused before"
        return collect(self._engine.objective, layer, batches, self._words)

    def _kept(self, batches: Batches, watch: Watch) -> Iterator[tuple[Mapping[str, Any], Tensor]]:
        """Yields batches, and has the watch keep what their forwards showed at labelled positions."""
        for batch, out in batches:
            yield batch, out
            wanted = targets(self._engine.sharding.module, batch["labels"]).reshape(-1)
            watch.keep((wanted != IGNORE).nonzero()[:, 0])

    def _term(self, watch: Watch, plain: States, few: Batches) -> dict[str, Tensor]:
        """Returns the term's tensors, the same on every rank."""
        engine, words = self._engine, len(self._words)
        layer, errors = watch.best(plain.truth, plain.held, words)
        self.found = {"inner_layer": layer, "inner_layers_errors": errors}
        x = watch.inputs(layer)
        states = States(x, plain.logits, plain.truth, plain.held)
        # Not to what is held out, by which the output layer's ridge is chosen behind the term.
        change = fit(states, False, self._reduce, with_held=False).weight
        path, eps = writer_of(engine.sharding, layer), STEP * watch.length(layer)
        left = self._directions(few)
        answers = measure(engine.objective, path, few, left, eps)
        right = agreed(lambda: solved(answers, change))  # whose last bits are a processor's
        return {
            LAYER: torch.tensor([layer]), LEFT: left.t().contiguous(), RIGHT: right.contiguous()
        }  # fmt: skip

    def _directions(self, few: Batches) -> Tensor:
        """Returns u_c, unit vectors along the words' rows of the output layer less their mean: (C, d)."""
        output = self._engine.output_layer.layer
        assert output is not None, "refused before"
        batch = next(iter(few))[0]
        rows = rows_of(self._engine.objective, output, batch, self._words).float().cpu()
        own = F.normalize(rows - rows.mean(dim=0), dim=1)
        return agreed(lambda: own)


class Again:
    """Batches that are made anew each time they are run through, the first of them alone where `most` is
    given."""

    def __init__(self, make: Any, most: int | None = None) -> None:
        self._make, self._most = make, most

    def __iter__(self) -> Iterator[tuple[Mapping[str, Any], Tensor]]:
        return islice(self._make(), self._most)


def refuse_unfit(engine: Engine, words: Tensor | None) -> None:
    """Raises ConfigError if the run is to fit an inner term and cannot."""
    if engine.config.inner_layer == "off":
        return
    if words is None:
        raise ConfigError(
            "inner_layer: is fitted to label words; use --objective choices, or leave it off"
        )
    layers_to_watch(engine)
