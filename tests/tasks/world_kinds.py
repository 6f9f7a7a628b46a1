"""Encoder-decoder and sequence-classification models over sharded weights: losses, scores and answers of one
process, with ranks that have nothing to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_classes
import test_seq2seq
import torch
import world_fsdp2
from kinds import ENCODER_DECODERS, NO_TABLE, model_for, tokenizer_for
from test_classes import NAMES, SPEC
from tiny import part_of
from torch import nn
from world_zero3 import ZERO3
from worlds import World, case

import tezo_ds
from tezo_ds.intake.causality import refuse_seen_answers
from tezo_ds.sharding import zero3
from tezo_ds.tasks import collate
from tezo_ds.tasks.evaluation import Evaluator
from tezo_ds.tasks.generation import Generated, Generator
from tezo_ds.tasks.metrics import metric_of
from tezo_ds.tasks.posing import posing_of

FIELDS = {"rank": 2, "seed": 3, "rho": 1e-2, "lr": 1e-3, "queries": 2, "exclude": NO_TABLE}
SHARDED: tuple[Callable[[nn.Module], Any], ...] = (
    lambda model: zero3.wrap(model, dict(ZERO3)),
    world_fsdp2.shard,
)


def engine_of(module: nn.Module, **more: Any) -> tezo_ds.Engine:
    engine = tezo_ds.initialize(module, {**FIELDS, **more})
    noise = torch.randn(engine.space.numel, generator=torch.manual_seed(1))
    engine.method.coefficients.copy_(0.1 * noise)
    return engine


@case(worlds=(2,))
def answers_of_decoders_are_those_of_one_process(world: World) -> None:
    """The last rank has no prompt, and `generate` is the first that any rank does."""
    for name in ENCODER_DECODERS:
        tokenizer = tokenizer_for(name, test_seq2seq.TEXTS)
        posing = posing_of(model_for(name, tokenizer), tokenizer, None, False)
        alone = engine_of(model_for(name, tokenizer))
        prompts = posing.prompts([example.prompt for example in test_seq2seq.QA], 64)
        mine = prompts[world.rank :: world.size - 1] if world.rank < world.size - 1 else []
        alone.sharding.everyone = 1
        made = [_one(alone, tokenizer, prompt) for prompt in mine]
        for shard in SHARDED:
            engine = engine_of(shard(model_for(name, tokenizer)))
            generator = Generator(engine, tokenizer, 2, 6, ())
            assert generator(mine) == made
            value, _ = Generated(metric_of("exact"), generator, mine, made)()
            assert value == 1.0 or not any(made)


def _one(engine: tezo_ds.Engine, tokenizer: Any, prompt: list[int]) -> str:
    """Returns an answer that one process makes step by step, by forwards of the model alone."""
    module: Any = engine.sharding.module
    given = [*posing_of(module, tokenizer, None, False).start]  # type: ignore[attr-defined]
    said: list[int] = []
    with torch.no_grad(), engine.applied():
        while len(said) < 6 and said[-1:] != [1]:
            decoder = torch.tensor([[*given, *said]])
            logits = module(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits
            said.append(int(logits[0, -1].argmax()))
    return str(tokenizer.decode(said, skip_special_tokens=True))


@case(worlds=(3,))
def steps_of_decoders_are_those_of_one_process(world: World) -> None:
    for name in ENCODER_DECODERS:
        tokenizer = tokenizer_for(name, test_seq2seq.TEXTS)
        examples = test_seq2seq.films(test_seq2seq.WORDS)[:5]
        spec = SPEC.model_copy(update={"verbalizers": test_seq2seq.WORDS})
        expected = None
        makes = [*SHARDED, lambda model: model]
        for more in ({}, {"probe": "inplace", "exclude": ()}):
            for shard in reversed(makes):
                engine = engine_of(shard(model_for(name, tokenizer)), **more)
                posing = posing_of(engine.sharding.module, tokenizer, spec, False)
                filler = posing.encode(examples[:1], 64)[0]
                refuse_seen_answers(engine, tokenizer, "a film")
                found = []
                for step in range(3):
                    mine = examples[: 4 - step][world.rank :: world.size]
                    batch = collate(posing.encode(mine, 64), 2, filler=filler)
                    found.append(engine.step(batch).loss)
                score = Evaluator(engine, tokenizer, spec, examples, 2, 64)()
                found += [float(score.accuracy or 0), score.loss]
                expected = expected or found
                assert found == pytest.approx(expected, rel=1e-4), shard
            expected = None


@case(worlds=(3,))
def steps_of_classes_are_those_of_one_process(world: World) -> None:
    for name in (NAMES[0], NAMES[3]):  # an encoder and a decoder
        tokenizer = tokenizer_for(name, test_classes.TEXTS)
        expected = None
        for shard in (lambda model: model, *SHARDED):
            for more in ({}, {"placement": "per_example"}):
                engine = engine_of(shard(model_for(name, tokenizer, num_labels=3)), **more)
                found = []
                for step in range(3):
                    whole = test_classes.batch_of(7, step)
                    found.append(engine.step(part_of(whole, world.rank, world.size)).loss)
                if more:
                    assert len(set(found)) == 3
                    continue
                score = Evaluator(engine, tokenizer, SPEC, test_classes.films()[:5], 2, 64, 2)()
                found += [float(score.accuracy or 0), score.loss]
                expected = expected or found
                assert found == pytest.approx(expected, rel=1e-4), shard
