"""How the words' logits answer to what is added behind an inner layer, at the labelled position.

After a plain forward that keeps its keys and values, the labelled position alone runs again, once for each
direction, with ε u added to the inner layer's output: J u = (z(ε) - z(0)) / ε. What stands before it is not
computed anew, nor blocks before the inner layer's, so C directions cost C tokens an example in the rest of
the blocks, and not C forwards. They run beside one that has nothing added, in one forward, so rounding that
follows from a product's shape cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tezo_ds.errors import ConfigError
from tezo_ds.losses.objective import Objective
from tezo_ds.models.structure import is_classifier, is_encoder_decoder, is_masked_lm
from tezo_ds.output_layer.attending import Attended, Seen, gathered
from tezo_ds.output_layer.columns import Answers
from tezo_ds.output_layer.entry import Late
from tezo_ds.output_layer.going import Change, GoingOn, unfit, wide
from tezo_ds.output_layer.inner import InnerLayer, directions
from tezo_ds.output_layer.values import Gathered
from tezo_ds.output_layer.watched import Watched
from tezo_ds.trunk.stand_ins import replaced

PUSH = 0.05  # ε over the length of the hidden state behind the block
OTHERS = 4  # positions before a labelled one whose inputs are kept


class Answering:
    """Context manager: knows of every batch that runs inside what is known of some inner layers.

    Args:
        objective: of the model, whose terms are off.
        words: token ids, int64 (C,).
        inner: the inner layers.
        rows: gives the words' rows of the output layer, (C, d), once a batch has run.
        late: is given what enters the first inner layer's block.
    """

    def __init__(
        self, objective: Objective, words: Tensor, inner: Sequence[InnerLayer],
        rows: Callable[[], Tensor], late: Late,
    ) -> None:  # fmt: skip
        self._objective, self._sharding = objective, objective.sharding
        self._words, self._inner, self._rows, self._late = words, inner, rows, late
        self._going, self._stack = GoingOn(objective, words), ExitStack()
        self._watched: list[Watched] = []

    def __enter__(self) -> Answering:
        module = self._sharding.module
        self._watched = [
            (Watched if inner.heads is None else Attended)(module, inner, self._stack)
            for inner in self._inner
        ]
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @cached_property
    def directions(self) -> Tensor:
        """U, float32 (d, C)."""
        return directions(self._rows())

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Context manager: the model's forward inside keeps its keys and values."""
        module = self._sharding.module
        forward = module.forward
        self._going.kept = None

        def keep(**inputs: Any) -> Any:
            outputs = forward(**{**inputs, "use_cache": True})
            self._going.kept = getattr(outputs, "past_key_values", None)
            return outputs

        with ExitStack() as looking, replaced(module, keep):
            for watched in self._watched:
                looking.enter_context(watched.entry.watching())
            yield

    @torch.no_grad()
    def of(
        self, batch: Mapping[str, Any], positions: Tensor, logits: Tensor
    ) -> list[Answers | Gathered]:
        """Returns what is known of each inner layer, for the batch that has just run inside `keeping`. Every
        rank must call it.

        Args:
            batch: the examples, (B, T).
            positions: flat positions with a label, int64 (k,).
            logits: of the words there, (k, C).

        Raises:
            ConfigError: the model cannot go on from keys and values.
        """
        length = batch["labels"].shape[1]
        device = self._sharding.device
        own = positions.to(device) if len(positions) else torch.zeros(1).long().to(device)
        rows, places = own // length, own % length
        # Of blocks that run.
        self._going.refuse_without_keys(min(watched.entry.place for watched in self._watched))
        self._going.refuse_longer(length)
        mask, count = batch.get("attention_mask", torch.ones_like(batch["labels"])), len(positions)
        before = positions_before(mask.to(device), rows[:count], places[:count])
        found = [
            self._answers(watched, batch, rows, places, before, logits.to(device), count)
            for watched in self._watched
        ]
        self._late.keep([watched.entry for watched in self._watched])
        return found

    def _answers(
        self, watched: Watched, batch: Mapping[str, Any], rows: Tensor, places: Tensor,
        before: tuple[Tensor, Tensor], logits: Tensor, count: int,
    ) -> Answers | Gathered:  # fmt: skip
        path, n = watched.inner.path, watched.inner.sizes[1]
        if self._sharding.maxima([watched.given.numel() != batch["labels"].numel() * n])[0]:
            why = f"runs {path} on other positions than all of a batch, as experts do"
            raise unfit(self._objective, why)
        given = watched.given.reshape(*batch["labels"].shape, n)
        hidden = wide(watched.behind[rows, places])  # (k, d)
        step = PUSH * hidden.norm(dim=1)  # (k,): ε of each example

        def within(branches: int, change: Change) -> None:
            self._going.within(watched, batch, rows, places, branches, change)

        def answers(pushes: Tensor) -> Tensor:
            """Returns (z(ε) - z(0)) / ε, (K, k, C), of pushes (K, k, m) times ε."""
            pushes = torch.cat([torch.zeros_like(pushes[:1]), pushes])
            watched.push = (pushes * step[:, None]).flatten(0, 1)  # branch by branch
            try:
                found = self._going.tried(
                    watched,
                    logits,
                    lambda: self._going(watched, batch, rows, places, len(pushes)),
                )
            finally:
                watched.push = None
            return (found[1:] - found[0]) / step[:, None]

        if isinstance(watched, Attended):
            seen = Seen(given, rows, places, before, count, self._going.kept.layers)
            return gathered(
                self._objective, watched, seen, batch, len(self._words), within, answers
            )
        found = answers(self.directions.to(step).t()[:, None].expand(-1, len(step), -1))
        inputs = given[rows, places][:count]  # (k, n)
        return Answers(inputs, found.permute(1, 2, 0)[:count].contiguous(), given[before])


def positions_before(mask: Tensor, rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Returns rows and places of OTHERS positions before each labelled one, from the first to the last that
    is no padding; of a labelled position that has none before it nothing.

    Args:
        mask: what is no padding, (B, T).
        rows, places: of the labelled positions, int64 (k,).
    """
    at = torch.arange(mask.shape[1], device=mask.device)
    counted = (mask[rows].bool() & (at < places[:, None])).cumsum(dim=1)  # (k, T)
    last = counted.amax(dim=1, keepdim=True) - 1
    nth = last * torch.arange(OTHERS, device=mask.device) // (OTHERS - 1)  # (k, OTHERS)
    found = torch.searchsorted(counted, nth + 1)
    some = last[:, 0] >= 0
    return rows[some].repeat_interleave(OTHERS), found[some].flatten()


def refuse_unfit(objective: Objective) -> None:
    """Raises ConfigError if the model is of a kind that has no inner layers to be fitted."""
    module = objective.sharding.module
    if is_masked_lm(module) or is_encoder_decoder(module) or is_classifier(module):
        raise ConfigError(
            f"inner_layers: {type(module).__name__} is no causal model, so its labelled positions cannot run "
            "by themselves; leave inner_layers off"
        )
