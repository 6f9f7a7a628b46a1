"""Adapters in an engine of one process: the oracle's run, the models that have places, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_oracle import (
    PUBLISHED,
    RUN,
    assert_the_oracle,
    batch_of,
    gauss_newton,
    oracle,
    parameters_of,
)
from tiny import make_batch, tiny
from torch import nn

import tezo_ds
from tezo_ds.directions.branches import Ask, LowRank, Spread
from tezo_ds.trunk.trunk import EXAMPLE_IDS

ADAZETA = {
    "query_schedule": "adazeta", "queries_max": 3, "query_alpha": 0.85, "query_beta": 0.9,
    "steps_per_epoch": 5,
}  # fmt: skip
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "tt, more queries from epoch to epoch": ("tezo", {**PUBLISHED, **ADAZETA}),
    "tt, zero": ("tezo", {"adapter": "tt", "lr": 1e-1, "queries": 1}),
    "tt in the mlp, core by core, a branch at a time, momentum": (
        "tezo-m",
        {**PUBLISHED, "adapter_sites": "mlp", "contraction": "sequential", "branch_chunk": 1, "queries": 1},
    ),
    "tt of given modes, Adam": (
        "tezo-adam-coef", {**PUBLISHED, "tt_modes": (5, 5, 2, 3), "lr": 1e-3, "queries": 1}
    ),
    "tt, tanh": ("tezo", {**PUBLISHED, "tt_act": "tanh", "queries": 1}),
    "tt, tanh, core by core": (
        "tezo", {**PUBLISHED, "tt_act": "tanh", "queries": 1, "contraction": "sequential"}
    ),
    "lora": ("tezo", {"adapter": "lora", "rank": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_the_oracles_run(name: str) -> None:
    method, fields = RUNS[name]
    engine = tezo_ds.initialize(tiny().double(), {**RUN, **fields, "method": method})
    before = {name: p.clone() for name, p in engine.sharding.module.named_parameters()}
    assert_the_oracle(engine, oracle(method, fields), 0, 1, close=1e-5)  # norms are in float32
    after = dict(engine.sharding.module.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", [PUBLISHED, {"adapter": "lora", "rank": 3}], ids=["tt", "lora"])
def test_solved_steps_are_the_oracles(kind: dict[str, Any]) -> None:
    fields = {**RUN, **kind, "method": "tezo-gn", "lr": 1.0, "queries": 4, "damping": 0.2}
    engine = tezo_ds.initialize(tiny().double(), fields)
    start = parameters_of(engine)
    reports = [engine.step(batch_of(step)) for step in range(6)]
    assert {len(report.kappa) for report in reports} == {4, 5}, "the last step is a direction, too"
    found, expected = parameters_of(engine), gauss_newton(fields, 0.2, (0.25, 0.5, 1.0))
    moved = max(float((expected[name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-3
    for name, theirs in expected.items():
        torch.testing.assert_close(found[name], theirs, rtol=0, atol=1e-4 * moved)
    again = tezo_ds.initialize(tiny().double(), fields)
    for report in reports:
        again.replay(report.step, report.kappa, report.lr, report.rho, report.solved)
    assert all(torch.equal(again.state()[k], part) for k, part in engine.state().items())


ATTENTION, FEED_FORWARD = "self_attn.o_proj", "mlp.down_proj"
# Modules of the first block by kind of model and of adapter, in the words of transformers.
PLACES: dict[str, tuple[str, list[str], list[str], list[str]]] = {
    "llama": (
        "model.layers.0", ["self_attn.o_proj", "mlp.down_proj"],
        ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"], ["self_attn.q_proj", "self_attn.v_proj"],
    ),
    "opt": (
        "model.decoder.layers.0", ["self_attn.out_proj", "fc2"], ["fc1", "fc2"],
        ["self_attn.v_proj", "self_attn.q_proj"],
    ),
    "neox": (
        "gpt_neox.layers.0", ["attention.dense", "mlp.dense_4h_to_h"],
        ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"], ["attention.query_key_value"],
    ),
    "gpt2": (
        "transformer.h.0", ["attn.c_proj", "mlp.c_proj"], ["mlp.c_fc", "mlp.c_proj"], ["attn.c_attn"],
    ),
    "roberta": (
        "roberta.encoder.layer.0", ["attention.output.dense", "output.dense"],
        ["intermediate.dense", "output.dense"], ["attention.self.query", "attention.self.value"],
    ),
    "qwen-moe": (
        "model.layers.0", ["self_attn.o_proj", "mlp"], [], ["self_attn.q_proj", "self_attn.v_proj"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLACES)
def test_places_of_each_architecture(kind: str) -> None:
    """A run begins as the base, exactly, and every parameter that acts at first order has moved."""
    batch = make_batch(3)
    base = tezo_ds.initialize(tiny(kind), {"probe": "inplace"}).loss(batch)
    prefix, *expected = PLACES[kind]
    kinds = ({}, {"adapter_sites": "mlp"}, {"adapter": "lora", "rank": 3})
    for more, paths in zip(kinds, expected, strict=True):
        fields = {**RUN, "adapter": "tt", "tt_rank": 3, **more}
        if not paths:
            with pytest.raises(tezo_ds.ConfigError, match="no layer that is known as a feed-for"):
                tezo_ds.initialize(tiny(kind), fields)
            continue
        engine = tezo_ds.initialize(tiny(kind), fields)
        found = [site.path for site in engine.selection.adapters.sites]
        assert found[: len(paths)] == [f"{prefix}.{path}" for path in paths]
        assert len(found) == 2 * len(paths)  # blocks
        assert engine.loss(batch) == base
        for step in range(3):
            assert min(map(abs, engine.step(make_batch(3, seed=step)).kappa)) > 1e-4
        assert engine.loss(batch) != base
        assert all(bool(part.any()) for part in engine.coefficients().values())


@pytest.mark.parametrize("cache", ["off", "memory"])
def test_adapters_of_late_layers_share_a_trunk(cache: str) -> None:
    fields = {**RUN, **PUBLISHED, "include": ["last:1"]}
    split = tezo_ds.initialize(tiny(), {**fields, "trunk_cache": cache})
    whole = tezo_ds.initialize(tiny(), {**fields, "shared_trunk": False})
    for _ in range(3):
        batch = {**make_batch(4), EXAMPLE_IDS: torch.arange(4)}
        assert split.step(batch).kappa == pytest.approx(whole.step(batch).kappa, rel=1e-3, abs=1e-3)
    trunk = split.objective.trunk
    assert trunk is not None and trunk.found is not None and trunk.found.first == 1
    assert {name.split(".")[2] for name in split.coefficients()} == {"1"}


@pytest.mark.parametrize(
    "more",
    [
        {"rho": "auto", "queries": 6}, {"normalize": "std"}, {"difference": "forward"},
        {"memory_budget": 0.01}, {"micro_batch": 2}, {"clip_kappa": 0.9},
        {"query_schedule": "adaptive", "queries_max": 4, "total_steps": 4, "steps_per_epoch": 1},
    ],
    ids=lambda more: next(iter(more)),
)  # fmt: skip
def test_what_works_for_tezo_works_here(more: dict[str, Any]) -> None:
    engine = tezo_ds.initialize(tiny(), {**RUN, **PUBLISHED, **more})
    for step in range(4):
        report = engine.step(make_batch(4, seed=step))
        assert report.dropped == 0 and all(report.kappa)
        assert len(report.kappa) == engine.config.queries_at(step)
    again = tezo_ds.initialize(tiny(), {**RUN, **PUBLISHED, **more})
    again.load_coefficients(engine.coefficients())
    batch = make_batch(4)
    assert again.loss(batch) == engine.loss(batch)


def test_numbers_are_float32_beside_16_bit_weights() -> None:
    """Hazard: in 16 bits the change of a branch would be lost beside parameters a thousand times as large."""
    fields = {**RUN, **PUBLISHED, "rho": 1e-4}
    engine = tezo_ds.initialize(tiny().to(torch.bfloat16), fields)
    assert engine.step(make_batch(4)).dropped == 0
    c = engine.method.branches(Ask.of(0, [0], 1e-4)).c
    prepared = engine.selection.adapters.prepared

    def slope(c: torch.Tensor, parts: torch.dtype = torch.float32) -> torch.Tensor:
        adapters = engine.selection.adapters
        adapters.dtypes = tuple(parts for _ in adapters.dtypes)
        branches = LowRank(c, engine.method.factors)
        left, right = prepared(branches, engine.space)[adapters.sites[0].name][2:4]
        above, below = (left @ right).double()
        return (above - below) / 2e-4

    assert set(engine.selection.adapters.dtypes) == {torch.float32}
    exact = slope(c, torch.float64)
    assert (slope(c) - exact).norm() < 0.01 * exact.norm()
    assert (
        slope(c.bfloat16().double()) - exact
    ).norm() > 0.5 * exact.norm()  # without the handling


def test_many_numbers_are_made_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as all at once, of adapters, of vectors, and of matrices in place."""
    runs: list[dict[str, Any]] = [
        {**PUBLISHED, "train_vectors": True},
        {"rank": 3, "probe": "inplace"},
    ]
    for fields in ({**RUN, **more} for more in runs):
        found = []
        for at_once in (1 << 20, 1):
            monkeypatch.setattr("tezo_ds.methods.tezo.AT_ONCE", at_once)
            engine = tezo_ds.initialize(tiny(), fields)
            found.append([engine.step(make_batch(3, seed=step)).kappa for step in range(2)])
            asked = engine.method.branches(Ask.of(2, [0, 1], 1e-2))
            assert isinstance(asked, Spread) == (at_once == 1) and not asked.idle
        assert found[0] == found[1]


def test_norms_may_train_beside() -> None:
    engine = tezo_ds.initialize(tiny(), {**RUN, **PUBLISHED, "train_vectors": True})
    for step in range(2):
        engine.step(make_batch(3, seed=step))
    names = {v.name for v in engine.space.vectors}
    assert "model.norm.weight" in names and not any(name.endswith("proj.weight") for name in names)
    assert all(bool(part.any()) for part in engine.coefficients().values())


class Bare(nn.Module):
    """A model without blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(61, 22), nn.Linear(22, 61)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(input_ids))


class Blocks(Bare):
    """A model of blocks whose layers have names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(22, 22))])


@pytest.mark.parametrize(
    ("model", "fields", "words"),
    [
        (Bare, {}, "adapter: Bare has no blocks that are known"),
        (Blocks, {}, "adapter: Sequential has no layer that is known as an attention's output"),
        (Blocks, {"adapter": "lora"}, "no layer that is known as an attention's query or value"),
        (tiny, {"bottleneck": 23}, "bottleneck: 23 is above the size 22"),
        (tiny, {"tt_modes": [4, 4, 2, 3]}, "tt_modes: the product of 4, 4, 2, 3 does not fit"),
        (tiny, {"tt_modes": [5, 5, 2, 3, 2]}, "tt_modes: 5, 5, 2, 3, 2 are more than modes of"),
        (tiny, {"tt_modes": [0, 5]}, "tt_modes.0: Input should be greater than or equal to 1"),
        (tiny, {"tt_rank": 0}, "tt_rank: Input should be greater than or equal to 1 (got 0)"),
        (tiny, {"adapter": "lora", "rank": 0}, "rank: Input should be greater than or equal to 1"),
        (tiny, {"adapter": "lora", "rank": "auto"}, "rank: is for weights that change"),
        (tiny, {"method": "mezo"}, "adapter: tt is for tezo, tezo-m, tezo-adam-coef"),
        (tiny, {"method": "tezo-adam"}, "and tezo-gn, not for method tezo-adam"),
        (tiny, {"refresh_every": 2}, "refresh_every: is for weights that change"),
        (tiny, {"include": ["auto"]}, "include: is for weights that change"),
        (tiny, {"probe": "inplace"}, "probe: is for weights that change"),
        (tiny, {"include": ["*.nothing"]}, "no adapter trains: include ['*.nothing']"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(model: Any, fields: dict, words: str) -> None:
    with pytest.raises(tezo_ds.ConfigError) as caught:
        tezo_ds.initialize(model(), {"adapter": "tt", "bottleneck": 6, **fields})
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "words"), [("tt", "nonlinearity"), ("lora", "merged by peft")])
def test_no_merge(kind: str, words: str) -> None:
    engine = tezo_ds.initialize(tiny(), {"adapter": kind, "bottleneck": 6})
    for ask in (engine.merge, engine.state_dict):
        with pytest.raises(tezo_ds.ConfigError, match=words):
            ask()
