"""Biases and norm weights in the fused probe: the same losses as in place, whatever the norm."""

from __future__ import annotations

import pytest
import torch
from tiny import HEADS, SIZES, VOCABULARY, make_batch, tiny
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

import tezo_ds
from tezo_ds.probes.vectors import uncovered_vectors
from tezo_ds.sharding import sharding_of

FIELDS = {
    "rank": 2,
    "rho": 1e-2,
    "lr": 1e-2,
    "queries": 2,
    "train_vectors": True,
    "method": "tezo-m",
}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    shared = {**SIZES, **HEADS, "initializer_range": 0.1, "num_key_value_heads": 1, "head_dim": 10}
    if kind == "gemma3":  # y = x̂ (1 + w)
        config = Gemma3TextConfig(**shared, intermediate_size=37, sliding_window=8)
        return Gemma3ForCausalLM(config).eval()
    if kind == "qwen3":  # norms of each head's queries and keys
        return Qwen3ForCausalLM(Qwen3Config(**shared, intermediate_size=37)).eval()
    return tiny(kind)


@pytest.mark.parametrize("kind", ["llama", "opt", "neox", "gpt2", "gemma3", "qwen3"])
@pytest.mark.parametrize("matrices", [True, False])
def test_fused_and_inplace_measure_the_same(kind: str, matrices: bool) -> None:
    exclude = (
        [] if matrices else [name for name, p in build(kind).named_parameters() if p.dim() > 1]
    )
    fused, inplace = (
        tezo_ds.initialize(build(kind), {**FIELDS, "exclude": exclude, "probe": probe})
        for probe in ("fused", "inplace")
    )
    vectors = [name for name, p in build(kind).named_parameters() if p.dim() == 1]
    assert [vector.name for vector in fused.space.vectors] == vectors
    start = fused.state_dict()
    for step in range(3):
        batch = make_batch(3, seed=step)
        ours, theirs = fused.step(batch), inplace.step(batch)
        assert ours.kappa == pytest.approx(theirs.kappa, rel=2e-3, abs=1e-4)
        assert min(map(abs, ours.kappa)) > 1e-3
    assert fused.loss(batch) == pytest.approx(inplace.loss(batch), rel=1e-5)
    merged = fused.state_dict()
    assert all(not torch.equal(merged[name], start[name]) for name in vectors)


class Squared(nn.Module):
    """A norm that is not affine in its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(22))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.square()


class Scaled(nn.Module):
    """An affine layer of another shape than a norm's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.sum()


@pytest.mark.parametrize("layer", [Squared, Scaled])
def test_what_is_not_affine_is_named_and_measured_in_place(
    layer: type[nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Embedding(VOCABULARY, 22), layer(), nn.Linear(22, VOCABULARY))
    assert uncovered_vectors(sharding_of(model), ["1.weight", "2.bias"]) == {
        "1.weight": f"weight of {layer.__name__}"
    }
    engine = tezo_ds.initialize(model, FIELDS)
    assert (
        engine.probe.name == "inplace" and f"1.weight (weight of {layer.__name__})" in caplog.text
    )


def test_vectors_are_frozen_unless_asked_for() -> None:
    selection = tezo_ds.initialize(tiny("opt"), {"rank": 2}).selection
    assert not selection.vectors
    assert next(reason for reason in selection.frozen if "train_vectors" in reason)
