"""Generation over sharded weights: ranks whose texts end at different lengths, and one that has none."""

from __future__ import annotations

import torch
import world_fsdp2
from test_generation import NEW, PROMPTS, TEXTS, greedy
from tiny import tiny
from tiny_tokenizer import tiny_tokenizer
from torch import nn
from world_zero3 import ZERO3
from worlds import World, case

import tezo_ds
from tezo_ds.sharding import zero3
from tezo_ds.tasks.generation import Generated, Generator
from tezo_ds.tasks.metrics import metric_of


def model() -> nn.Module:
    made = tiny("llama", tied=False)
    torch.manual_seed(0)
    made.resize_token_embeddings(len(tiny_tokenizer(TEXTS)), mean_resizing=False)
    return made.eval()


def engine_of(module: nn.Module) -> tezo_ds.Engine:
    engine = tezo_ds.initialize(module, {"rank": 2, "seed": 3})
    noise = torch.randn(engine.space.numel, generator=torch.manual_seed(1))
    engine.method.coefficients.copy_(0.3 * noise)
    return engine


@case(worlds=(2, 3))
def answers_are_those_of_one_process(world: World) -> None:
    """The last rank has no prompt; the others' answers end after different numbers of tokens."""
    tokenizer = tiny_tokenizer(TEXTS)
    alone = engine_of(model())
    mine = [PROMPTS[world.rank]] if world.rank < world.size - 1 else []
    prompts = [tokenizer(text)["input_ids"] for text in mine]
    expected = [
        tokenizer.decode(greedy(alone, ids, NEW)[len(ids) :], skip_special_tokens=True)
        for ids in prompts
    ]
    stop = expected[0][1:3] if expected and world.rank == 0 else "never"
    expected = [text.split(stop)[0] for text in expected]
    for way in (lambda: zero3.wrap(model(), dict(ZERO3)), lambda: world_fsdp2.shard(model())):
        engine = engine_of(way())
        generator = Generator(engine, tokenizer, 2, NEW, (stop,))
        assert generator(prompts) == expected
        value, made = Generated(metric_of("exact"), generator, prompts, expected)()
        assert made == expected and value == 1.0
        wrong = ["another answer"] * len(prompts) if world.rank == 0 else expected
        value, _ = Generated(metric_of("exact"), generator, prompts, wrong)()
        assert value == 1 - 1 / (world.size - 1)
