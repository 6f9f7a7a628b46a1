"""The fused probe: equal to the in-place one, and a clear refusal of whatever it cannot do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tiny import VOCABULARY, losses_of_both_probes, make_batch, tiny
from torch import nn
from trained import groups
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM

import tezo_ds
from tezo_ds.directions.branches import Ask
from tezo_ds.engine.live_bytes import LiveBytes
from tezo_ds.probes import sites

KINDS = [
    (kind, tied) for kind in ("llama", "opt", "neox", "gpt2", "roberta") for tied in (True, False)
]


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_fused_and_inplace_measure_the_same_losses(kind: str, tied: bool) -> None:
    engines = [
        tezo_ds.initialize(
            tiny(kind, tied),
            {"rank": 4, "rho": 1e-2, "lr": 1e-3, "queries": 2, "probe": probe},
        )
        for probe in ("fused", "inplace")
    ]
    for step in range(4):
        branches = engines[0].method.branches(Ask.of(step, range(2), 1e-2))
        batch = make_batch(3, seed=step)
        fused, inplace = (
            engine.probe.measure(engine.objective, batch, branches) for engine in engines
        )
        torch.testing.assert_close(fused, inplace, rtol=1e-5, atol=0)
        assert (fused[0].max() - fused[0].min()) / fused[0].mean() > 1e-3  # branches do differ
        for engine in engines:
            engine.step(batch)
        engines[1].method.coefficients.copy_(engines[0].method.coefficients)
    batch = make_batch(5)
    assert engines[0].loss(batch) == pytest.approx(engines[1].loss(batch), rel=1e-5)


def test_sites_that_read_one_tensor_share_its_product() -> None:
    engine = tezo_ds.initialize(tiny("llama"), {"rank": 2})
    alone = engine.loss(make_batch(3))
    engine.step(make_batch(3))
    block = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert groups(engine) == [["embed_tokens"], *block, *block, ["lm_head"]]
    engine.method.coefficients.zero_()
    assert engine.loss(make_batch(3)) == alone


def slopes(dtype: torch.dtype) -> torch.Tensor:
    """Measures κ of 24 directions at coefficients of 100 ρ."""
    config = {"rank": 4, "rho": 1e-3, "queries": 24, "lr": 0.0, "seed": 1}
    engine = tezo_ds.initialize(tiny("llama", tied=False).to(dtype), config)
    generator = torch.Generator().manual_seed(2)
    engine.method.coefficients.copy_(0.1 * torch.randn(engine.space.numel, generator=generator))
    return torch.tensor(engine.step(make_batch(128, length=60)).kappa, dtype=torch.float64)


@pytest.mark.slow
def test_bfloat16_slopes_survive_coefficients_a_hundred_times_rho() -> None:
    exact = slopes(torch.float32)
    start = sites.Group.start

    def start_in_bfloat16(self: sites.Group, c: torch.Tensor) -> None:
        start(self, c.to(torch.bfloat16).float())

    with mock.patch.object(sites.Group, "start", start_in_bfloat16):
        coarse = (slopes(torch.bfloat16) - exact).norm() / exact.norm()
    ours = (slopes(torch.bfloat16) - exact).norm() / exact.norm()
    assert ours < 0.07 and coarse > 2 * ours, (ours, coarse)


class Scaled(nn.Embedding):
    """An embedding that does more than a lookup, as Gemma's does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 3.0


class Doubled(nn.Linear):
    """A linear layer whose product is not the last thing that happens."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input * 2, self.weight, self.bias).square()


class Odd(nn.Module):
    """A model with subclassed layers, learnt positions of shape (1, T), a shared projection of them, and
    flattened tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = Scaled(VOCABULARY, 8), nn.Embedding(16, 8)
        self.place_map = nn.Linear(8, 8)
        self.inner, self.head = Doubled(8, 9), nn.Linear(9, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        places = self.place_map(self.places(torch.arange(input_ids.shape[1])[None]))
        x = self.words(input_ids) + places
        return self.head(self.inner(x.flatten(0, 1))).view(*input_ids.shape, -1)


def test_layers_that_do_more_than_their_base_class() -> None:
    fused, inplace = losses_of_both_probes(Odd, "whole")
    assert fused == pytest.approx(inplace, rel=1e-5)
    assert F.linear.__name__ == "linear" and not hasattr(F.embedding, "__wrapped__")


class Mixed(nn.Module):
    """A model that sums over examples before a layer, so that rows no longer belong to branches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(self.first(x)[:3])[:1]


class Idle(nn.Module):
    """A model with a layer that no forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def total(outputs: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return outputs.square().sum(dim=1), torch.ones(len(outputs))


def test_fused_says_what_it_cannot_measure() -> None:
    batch = {"x": torch.randn(2, 4, generator=torch.Generator().manual_seed(0))}
    with pytest.raises(tezo_ds.ProbeError, match=r"second: input of shape \(3, 4\) does not show"):
        tezo_ds.initialize(Mixed(), {"rank": 1, "probe": "fused"}, total).step(batch)
    with pytest.raises(
        tezo_ds.ProbeError, match=r"unused\.weight took no part .* add it to exclude"
    ):
        tezo_ds.initialize(Idle(), {"rank": 1, "probe": "fused"}, total).step(batch)
    with pytest.raises(
        tezo_ds.ProbeError,
        match=r"cannot reach model\.layers\.0\.mlp\.gate\.weight .*experts\.gate_up_proj",
    ):
        tezo_ds.initialize(tiny("mixtral"), {"rank": 2, "probe": "fused"})


class Secret(nn.Linear):
    """A linear layer that multiplies in a way of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.T


def test_a_layer_whose_product_does_not_show_is_named() -> None:
    model: Any = tiny("llama")
    model.model.layers[1].mlp.down_proj = Secret(37, 22, bias=False)
    why = (
        r"down_proj.weight took no part in the forward that shows to the fused probe, as Secret has its own "
        r"\(1 such\); add it to exclude, .*, or set probe to inplace"
    )
    with pytest.raises(tezo_ds.ProbeError, match=why):
        tezo_ds.initialize(model, {"rank": 2}).step(make_batch(3))
    engine = tezo_ds.initialize(model, {"rank": 2, "probe": "inplace"})
    assert any(engine.step(make_batch(3)).kappa)


def test_falcons_linear_layers_are_plain_ones() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2}
        config = FalconConfig(**sizes, num_attention_heads=4, bias=True, initializer_range=0.1)
        return FalconForCausalLM(config).eval()

    fused, inplace = losses_of_both_probes(make, "chunks")
    torch.testing.assert_close(fused, inplace, rtol=1e-5, atol=0)


def test_auto_takes_fused_where_it_can_and_names_what_it_cannot(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert tezo_ds.initialize(tiny("llama"), {"rank": 2}).probe.name == "fused"
    with caplog.at_level(logging.WARNING):
        engine = tezo_ds.initialize(tiny("mixtral"), {"rank": 2, "rho": 1e-2, "lr": 1e-3})
    assert engine.probe.name == "inplace"
    assert "experts.gate_up_proj (gate_up_proj of MixtralExperts)" in caplog.text
    assert "and 3 more" in caplog.text
    for _ in range(3):
        assert engine.step(make_batch(3)).kappa[0] != 0


def test_inplace_restores_after_an_error_in_the_middle_of_a_write() -> None:
    model = tiny()
    engine = tezo_ds.initialize(model, {"rank": 2, "probe": "inplace"})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add = tezo_ds.directions.branches.add_low_rank_
    calls = []

    def fail_at_the_fifth(*args: object) -> None:
        calls.append(args)
        add(*args)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with (
        mock.patch.object(tezo_ds.directions.branches, "add_low_rank_", fail_at_the_fifth),
        pytest.raises(KeyboardInterrupt),
    ):
        engine.step(make_batch(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_fused_step_holds_no_more_than_a_plain_forward_and_the_factors() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=132, intermediate_size=350, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=1,
        )
    )  # fmt: skip
    engine = tezo_ds.initialize(model, {"rank": 4, "rho": 1e-2})
    batch = make_batch(8, length=63)

    def peak(run: Callable[[], object]) -> int:
        run()
        with LiveBytes() as live:
            run()
        return live.peak

    assert peak(lambda: engine.step(batch)) < 1.02 * peak(lambda: engine.objective(batch, 2))
    keep = sites.Group.term
    kept = []

    def hoarding(self: sites.Group, site: sites.Site, x: torch.Tensor) -> tuple:
        kept.append(keep(self, site, x))
        return kept[-1]

    with mock.patch.object(
        sites.Group, "term", hoarding
    ):  # x V of all layers, as if for a backward
        assert peak(lambda: engine.step(batch)) > 1.02 * peak(lambda: engine.objective(batch, 2))
