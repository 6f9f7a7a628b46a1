"""Models that multiply their output layer's result: the term is one on the logits that they give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from reducing import alone
from tiny import HEADS, SIZES, make_batch
from torch import Tensor, nn
from trained import logits, trained
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GraniteConfig,
    GraniteForCausalLM,
)

import tezo_ds
from tezo_ds.errors import ConfigError
from tezo_ds.export.adapter import save_adapter
from tezo_ds.export.merged import save_merged
from tezo_ds.output_layer.fit import Fitted, fit
from tezo_ds.output_layer.language import fit_tokens
from tezo_ds.output_layer.states import collect, collect_tokens
from tezo_ds.output_layer.term import BIAS, MULTIPLIER, term_of

WORDS = torch.tensor([7, 12, 40])
EXAMPLES, DIVISOR = 20, 8.0
MLP: dict[str, Any] = {
    **SIZES, **HEADS, "hidden_size": 24, "intermediate_size": 37, "initializer_range": 0.1,
    "tie_word_embeddings": False,
}  # fmt: skip


def granite(divisor: float = DIVISOR, rows_over: float = 1.0) -> nn.Module:
    """Makes a Granite that divides its logits, and whose output layer's rows are over a number."""
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**MLP, logits_scaling=divisor)).eval()
    with torch.no_grad():
        model.lm_head.weight /= rows_over
    return model


def examples(count: int = EXAMPLES) -> dict[str, Tensor]:
    batch = make_batch(count)
    batch["labels"][:] = -100
    chosen = WORDS[batch["input_ids"][:, 4] % 3]
    batch["input_ids"][:, 5] = batch["labels"][:, 5] = chosen
    return batch


def found(
    model: nn.Module, choices: bool, inner: str = "none", **fields: Any
) -> tuple[tezo_ds.Engine, Fitted]:
    """Fits the term of a model, and gives it to the engine."""
    engine = tezo_ds.initialize(model, {"rank": 2, **fields})
    layer, held = engine.output_layer.layer, torch.arange(EXAMPLES) % 5 == 4
    assert layer is not None
    words, maps = WORDS, engine.output_layer.inner.of_blocks(inner, "last")
    with torch.no_grad():
        if choices:
            engine.objective.choices = WORDS
            nobody = {**examples(), "labels": torch.full_like(examples()["labels"], -100)}
            batches = [(examples(), held), (nobody, held)]
            fitted = fit(collect(engine.objective, layer, batches, WORDS, maps), False, alone)
        else:
            batch = make_batch(EXAMPLES)
            words = batch["labels"][batch["labels"] >= 0].unique()
            states = collect_tokens(engine.objective, layer, [(batch, held)], words)
            fitted = fit_tokens(states, 5, alone)
    engine.output_layer.load(term_of(words, fitted))
    return engine, fitted


@pytest.mark.parametrize("choices", [True, False])
def test_a_term_is_that_of_rows_that_were_divided_before(choices: bool) -> None:
    """Rows that are smaller leave a model nothing to divide."""
    (mine, ours), (its, theirs) = found(granite(), choices), found(granite(1.0, DIVISOR), choices)
    assert ours.multiplier == 1 / DIVISOR and theirs.multiplier == 1
    assert ours.strength == theirs.strength and float(ours.bias.abs().max()) > 0.01
    assert ours.after.loss < ours.before.loss
    for part, other in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        torch.testing.assert_close(part, other, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        logits(mine.sharding.module), logits(its.sharding.module), rtol=0, atol=1e-5
    )
    batch = examples() if choices else make_batch(7)
    assert mine.loss(batch) == pytest.approx(its.loss(batch), rel=1e-5)
    with mine.output_layer.off():
        without = mine.loss(batch)
    assert mine.loss(batch) < without - 0.01


def test_biases_that_steps_move_are_on_the_logits() -> None:
    losses = []
    for model in (granite(), granite(1.0, DIVISOR)):
        solves = {"method": "tezo-gn", "include": ("last:1",), "queries": 2, "lr": 1.0, "rho": 1e-3}
        engine, _ = found(model.double(), True, **solves)
        engine.output_layer.move_biases(torch.tensor([1.0, -1.0, 0.0]))  # to be solved
        before = engine.output_layer.state[BIAS]
        many = examples(200)
        losses.append([engine.step(many).loss, engine.loss(many)])
        assert not torch.equal(engine.output_layer.state[BIAS], before)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert losses[0][1] < losses[0][0] - 0.01


def test_inner_layers_answer_as_those_of_rows_that_were_divided() -> None:
    (_, ours), (_, theirs) = (
        found(model, True, "layers:0-1") for model in (granite(), granite(1.0, DIVISOR))
    )
    for (_, A), (_, other) in zip(ours.inner, theirs.inner, strict=True):
        assert float(A.abs().max()) > 1e-3
        torch.testing.assert_close(A, other, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("choices", [True, False])
def test_peft_and_merged_weights_give_the_engines_logits(choices: bool, tmp_path: Path) -> None:
    term = found(granite(), choices)[0].output_layer.state
    assert term[MULTIPLIER].tolist() == [1 / DIVISOR]
    engine = trained(granite())
    engine.output_layer.load(term)
    with engine.applied():
        expected = logits(engine.sharding.module).clone()
    save_adapter(engine, tmp_path / "adapter", "the base")
    save_merged(engine, tmp_path / "merged")
    for folder, model in (
        ("adapter", PeftModel.from_pretrained(granite(), tmp_path / "adapter")),
        ("merged", AutoModelForCausalLM.from_pretrained(tmp_path / "merged")),
    ):
        made = logits(model)
        for (token,), bias in GenerationConfig.from_pretrained(tmp_path / folder).sequence_bias:
            made[..., token] += bias
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-5, msg=folder)


def test_a_cap_that_small_logits_do_not_show_is_one() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(**MLP, num_key_value_heads=1, head_dim=10, sliding_window=22)
    model = Gemma2ForCausalLM(config).eval().bfloat16()  # in which 30 tanh(1 / 30) is 1
    with torch.no_grad():
        model.lm_head.weight *= 0.1
    with pytest.raises(ConfigError, match="not by a factor alone, so that a term there is not one"):
        found(model, True)
