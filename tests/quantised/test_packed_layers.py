"""Packed layers are found by what they hold and do; methods and adapters learn beside them as beside plain
ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import make_batch, tiny
from torch import Tensor, nn

import tezo_ds
from tezo_ds.config.registry import METHODS
from tezo_ds.quantised.packed import misfits, packed_weights

CONFIG = {"rank": 3, "rho": 1e-2, "lr": 1e-3, "queries": 2, "seed": 4}
READ = ["tezo", "tezo-m", "tezo-adam-coef", "tezo-gn"]


class Bytes(nn.Module):
    """A linear layer of integers and scales that has no weight, as GPTQ's and AWQ's are."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        scales = layer.weight.data.abs().amax(dim=1) / 7
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", (layer.weight.data / scales[:, None]).round().char())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.qweight.to(x.dtype)) * self.scales
        return y if self.bias is None else y + self.bias


class Squared(Bytes):
    """A packed layer that is no linear map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class Rounded(Bytes):
    """A packed layer that rounds its inputs to 8 bits, as LLM.int8 does."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-9) / 127
        return super().forward((x / scale).round() * scale)


class Narrow(Bytes):
    """A packed layer whose kernel knows no such size."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("in_features must be divisible by 64")


def packed(kind: type[Bytes] = Bytes, at: str = "proj", model: str = "llama") -> nn.Module:
    """Makes a tiny model some of whose layers are packed."""
    made = tiny(model, tied=False)
    for path, module in list(made.named_modules()):
        if isinstance(module, nn.Linear) and at in path:
            made.set_submodule(path, kind(module))
    return made


def unpacked(model: nn.Module) -> nn.Module:
    """Makes the plain model that has the weights of a packed one, unpacked."""
    for weight in packed_weights(model).values():
        m, n = weight.shape
        bias = weight.module.bias
        plain = nn.Linear(n, m, bias is not None)
        plain.weight.data.copy_(weight.dequantised())
        plain.bias = bias
        model.set_submodule(weight.path, plain)
    return model


WAYS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in READ},
    "vectors": {"train_vectors": True},
    "periods": {"refresh_every": 2, "keep_periods": 3, "total_steps": 4},
    "tt": {"adapter": "tt", "bottleneck": 8},
    "lora": {"adapter": "lora"},
    "auto": {"rank": "auto", "rank_max": 3},
    "rho": {"rho": "auto"},
    "trunk": {"include": ["last:1"], "shared_trunk": True},
    "example": {"placement": "per_example"},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_only_reads_learns_what_it_learns_of_the_plain_model(way: str) -> None:
    kind = "opt" if way == "vectors" else "llama"  # whose layers have biases
    config = {**CONFIG, **WAYS[way]}
    engines = [
        tezo_ds.initialize(model, config)
        for model in (packed(model=kind), unpacked(packed(model=kind)))
    ]
    assert engines[0].sharding.packed and not engines[1].sharding.packed
    for step in range(3):
        reports = [engine.step(make_batch(4, seed=step)) for engine in engines]
        torch.testing.assert_close(*(torch.tensor(r.kappa) for r in reports), rtol=1e-3, atol=1e-3)
    found, wanted = (engine.coefficients() for engine in engines)
    assert found.keys() == wanted.keys()
    for name, part in wanted.items():
        torch.testing.assert_close(
            found[name], part, rtol=1e-2, atol=1e-3 * float(part.abs().max())
        )


def test_the_methods_that_only_read_are_all_those_that_learn_coefficients() -> None:
    assert [name for name, facts in METHODS.items() if facts.learns_coefficients] == READ


def test_packed_layers_are_named_as_the_plain_ones() -> None:
    model = packed(at="mlp")
    plain = {name: p.shape for name, p in tiny(tied=False).named_parameters()}
    found = {
        weight.name: weight.shape for weight in tezo_ds.initialize(model, CONFIG).sharding.weights()
    }
    assert found == plain  # a mix of packed and plain
    weights = packed_weights(model)
    assert len(weights) == 6 and not list(misfits(weights.values()))
    down = weights["model.layers.1.mlp.down_proj.weight"]
    assert down.nbytes == 22 * 37 + 4 * 22  # numbers and scales


@torch.no_grad()
def test_a_bias_takes_nothing_of_an_unpacked_weight() -> None:
    layer = nn.Linear(7, 5).bfloat16()
    layer.bias.fill_(1000.0)
    model = nn.ModuleDict({"layer": Bytes(layer)})
    (weight,) = packed_weights(model).values()
    exact = model.layer.qweight.to(torch.bfloat16) * model.layer.scales[:, None]
    assert torch.equal(weight.dequantised(), exact) and model.layer.bias is layer.bias
    assert weight.error() < 0.01


REFUSED: list[tuple[type[Bytes], str]] = [
    (Squared, r"layers.0.self_attn.q_proj.weight \(test_packed_layers Squared is no linear map"),
    (Narrow, r"does not take an input of 22 \(RuntimeError: in_features must be divisible by 64"),
]


@pytest.mark.parametrize(("kind", "why"), REFUSED)
def test_other_layers_are_named_and_refused(kind: type[Bytes], why: str) -> None:
    with pytest.raises(tezo_ds.ProbeError, match=why) as caught:
        tezo_ds.initialize(packed(kind), CONFIG)
    assert "exclude it, as inplace would write quantised weights" in str(caught.value)
    engine = tezo_ds.initialize(packed(kind, at="mlp"), {**CONFIG, "exclude": ["*mlp*"]})
    assert not any("mlp" in name for name in engine.space.slices)  # a mix of packed and plain


def test_rounded_inputs_are_said(caplog: pytest.LogCaptureFixture) -> None:
    tezo_ds.initialize(packed(), CONFIG)
    assert "rounds" not in caplog.text
    tezo_ds.initialize(packed(Rounded), CONFIG)
    assert "test_packed_layers Rounded rounds its inputs, to a relative error of 0.0" in caplog.text
