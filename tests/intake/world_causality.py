"""Causality is looked at by a forward of all ranks, which decide alike."""

from __future__ import annotations

from unittest import mock

import pytest
from architectures import tiny_of
from tiny import make_batch, part_of, tiny
from tiny_tokenizer import tiny_tokenizer
from torch import nn
from world_fsdp2 import shard
from world_zero3 import ZERO3
from worlds import World, case

import tezo_ds
from tezo_ds.errors import ConfigError
from tezo_ds.intake import causality
from tezo_ds.intake.causality import refuse_seen_answers

FIELDS = {"rank": 1, "rho": 1e-2, "lr": 1e-4}


def makes(kind: str) -> list[tezo_ds.Engine]:
    """Makes an engine of a model for each way of sharding."""

    def made() -> nn.Module:
        return tiny(kind) if kind == "llama" else tiny_of(kind, 300)

    ways = [tezo_ds.initialize(made(), {**ZERO3, "tezo": FIELDS})]
    return [*ways, tezo_ds.initialize(shard(made()), FIELDS), tezo_ds.initialize(made(), FIELDS)]


@case(worlds=(2, 3))
def all_ranks_refuse_a_model_that_looks_ahead(world: World) -> None:
    tokenizer = tiny_tokenizer(["a film"])
    for engine in makes("BertLMHeadModel"):
        with pytest.raises(ConfigError, match="BertLMHeadModel is not causal: it sees the answer"):
            refuse_seen_answers(engine, tokenizer, "a film")


@case(worlds=(2, 3))
def one_rank_that_sees_it_is_enough(world: World) -> None:
    tokenizer = tiny_tokenizer([], vocab_size=300)
    for engine in makes("llama"):
        with (
            mock.patch.object(causality, "looks_ahead", lambda *_: world.rank == 1),
            pytest.raises(ConfigError, match="is not causal"),
        ):
            refuse_seen_answers(engine, tokenizer, "a film")


@case(worlds=(2, 3))
def a_causal_model_passes_and_trains_on(world: World) -> None:
    class Few:
        """A tokenizer of the tiny model's words."""

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [5 + len(word) for word in text.split()]}

    for engine in makes("llama"):
        before = engine.loss(part_of(make_batch(7), world.rank, world.size))
        refuse_seen_answers(engine, Few(), "a film that was odd")  # type: ignore[arg-type]
        assert engine.loss(part_of(make_batch(7), world.rank, world.size)) == before
        assert [engine.step(part_of(make_batch(7), world.rank, world.size)) for _ in range(2)]
