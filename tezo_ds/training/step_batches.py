"""Batches of a run's steps: which examples, collated, and how much of them is padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tezo_ds.config import TezoConfig
from tezo_ds.errors import ConfigError
from tezo_ds.settings import Settings
from tezo_ds.tasks.batches import Order, batch_indices, by_length, lane_indices
from tezo_ds.tasks.encoded import (
    Encoded,
    collate,
    end_to_end,
    longest_of,
    losses_of_labels,
    rows_of,
    truncations,
)
from tezo_ds.tasks.lazy import LazyEncoded, pick
from tezo_ds.tasks.prompted import Prompted, collate_prompts
from tezo_ds.training.session import Session
from tezo_ds.trunk.trunk import EXAMPLE_IDS

FIRST, MUCH = 50, 0.2  # steps that are looked at before the first, and padding that is worth a word
Tokens = tuple[int, int]  # of batches over all ranks: padding, and all


def refuse_unfit(settings: Settings, config: TezoConfig) -> None:
    """Raises ConfigError if batches of like lengths, or of rows that stay on disk, are asked for that cannot
    be."""
    if settings.streaming and settings.group_by_length:
        raise ConfigError(
            "--group-by-length: needs all lengths before the first step, which --streaming does not know; "
            "leave one of the two out"
        )
    if settings.streaming and config.trunk_cache != "off":
        raise ConfigError(
            "--streaming: trunk_cache keeps hidden states, far more than the rows; leave one of the two out"
        )
    if settings.group_by_length and config.trunk_cache != "off":
        raise ConfigError(
            "--group-by-length: with trunk_cache an example keeps its place in the batch, so that later "
            "epochs could not be grouped; leave one of the two out"
        )
    if settings.padding_free:
        _refuse_rows_of_many(settings, config)


def _refuse_rows_of_many(settings: Settings, config: TezoConfig) -> None:
    """Raises ConfigError for an option that needs a row for each example."""
    unfit = {
        "trunk_cache": config.trunk_cache != "off",
        "micro_batch": config.micro_batch > 0,
        "placement per_example": config.placement == "per_example",
        "--reward": bool(settings.reward),
    }
    for name in (name for name, asked in unfit.items() if asked):
        raise ConfigError(
            f"--padding-free: a row holds several examples, and {name} needs a row for each; leave one of "
            "the two out"
        )


class StepBatches:
    """Batches of one run, a pure function of the step and the world.

    Attributes:
        lazy: whether examples are tokenised when a step takes them.
        cut: prompts, and answers, of which a part was cut in steps so far; counted where `lazy`.

    Args:
        session: whose engine takes them.
        examples: the training examples.
        batch_size: examples of a step over all ranks.
    """

    def __init__(self, session: Session, examples: Sequence[Encoded], batch_size: int) -> None:
        self._session, self._examples, self._batch_size = session, examples, batch_size
        config = session.engine.config
        self._cached = config.trunk_cache != "off"
        self.lazy, self.cut = isinstance(examples, LazyEncoded), [0, 0]
        self._flat = session.settings.padding_free
        self._order: Order | None = None
        if session.settings.group_by_length:
            lengths = [len(each.input_ids) for each in examples]
            self._order = by_length(lengths, batch_size, config.seed)

    def __call__(self, step: int) -> dict[str, Any]:
        """Returns this rank's examples of a step, which with a trunk cache always come to the same rank."""
        chosen = self._indices(step, self._session.engine.sharding.rank)
        batch = pick(self._examples, chosen)
        if isinstance(self._examples[0], Prompted):
            return collate_prompts(batch, self._session.pad_id, self._examples[0])
        if self._flat:
            return end_to_end(batch, self._session.pad_id, self._examples[0])
        collated = collate(batch, self._session.pad_id, filler=self._examples[0])
        if self._cached:
            collated[EXAMPLE_IDS] = torch.tensor(chosen or [0])
        return collated

    def tokens(self, step: int) -> Tokens:
        """Returns the tokens of a step's batches over all ranks, known without asking them; where examples
        are `lazy` each rank tells of its own, so that all must call this, after each step."""
        sharding = self._session.engine.sharding
        if self.lazy:
            batch = pick(self._examples, self._indices(step, sharding.rank))
            cut = [truncations(batch), losses_of_labels(batch)]
            own = torch.tensor([*self._size(batch), *cut], dtype=torch.float64)
            padding, computed, *cut = map(
                int, sharding.all_reduce(own.to(sharding.device)).tolist()
            )
            self.cut = [before + now for before, now in zip(self.cut, cut, strict=True)]
            return padding, computed
        batches = (
            pick(self._examples, self._indices(step, rank)) for rank in range(sharding.world_size)
        )
        sizes = [self._size(batch) for batch in batches]
        return sum(size[0] for size in sizes), sum(size[1] for size in sizes)

    def _size(self, batch: Sequence[Encoded]) -> Tokens:
        rows = batch or [
            self._examples[0]
        ]  # a rank that has run out computes one, which is padding
        if self._flat:
            lengths = [len(row.input_ids) for row in rows]
            ends = rows_of(lengths)
            computed = len(ends) * longest_of(ends, lengths)
            return computed - (sum(lengths) if batch else 0), computed
        real = computed = 0
        for each in zip(*map(_lengths, rows), strict=True):  # of encoders, or alone; of decoders
            real += sum(each) if batch else 0
            computed += len(each) * max(each)
        return computed - real, computed

    def told(self, steps: int) -> str | None:
        """Returns a line on the padding of the first of so many steps; None where there is little, or
        where lengths are not known yet."""
        if self.lazy:
            return None
        found = Padding()
        for step in range(min(steps, FIRST)):
            found.add(self.tokens(step))
        if found.share is None or found.share < MUCH:
            return None
        told = f"padding: {found.share:.0%} of the tokens that the first batches compute"
        if self._cached or self._order:
            return told
        told += "; --group-by-length makes batches of like lengths"
        return told + ", and --padding-free leaves next to none" * _may_share_rows(
            self._examples[0]
        )

    def _indices(self, step: int, rank: int) -> list[int]:
        world, seed = self._session.engine.sharding.world_size, self._session.engine.config.seed
        count, size = len(self._examples), self._batch_size
        if self._cached:
            return lane_indices(count, size, step, seed, rank, world)
        return batch_indices(count, size, step, seed, rank, world, self._order)


def _may_share_rows(encoded: Encoded) -> bool:
    """Returns whether examples like this may lie in one row: those of a causal model, on a loss."""
    others = (encoded.mask, encoded.answer, encoded.number)
    return not isinstance(encoded, Prompted) and all(part is None for part in others)


def _lengths(encoded: Encoded) -> tuple[int, int]:
    """Returns the tokens of a sequence, and those that its decoder reads beside it."""
    return len(encoded.input_ids), len(encoded.answer or ())


class Padding:
    """Padding of all steps that a run made, also by earlier processes on as many or other ranks."""

    def __init__(self) -> None:
        self.padding = self.computed = 0

    def add(self, tokens: Sequence[int]) -> None:
        """Counts a step's `StepBatches.tokens`."""
        self.padding, self.computed = self.padding + tokens[0], self.computed + tokens[1]

    @property
    def share(self) -> float | None:
        """Share of the computed tokens that is padding; None before the first step."""
        return round(self.padding / self.computed, 4) if self.computed else None
