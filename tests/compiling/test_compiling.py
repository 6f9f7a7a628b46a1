"""Blocks that compile: whole graphs, the same losses, no second graph for other numbers or sizes."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from deep import deep, engine_of, numbered
from tiny import make_batch, tiny
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from trained import logits

import tezo_ds
from tezo_ds.compiling import blocks
from tezo_ds.compiling.twins import run
from tezo_ds.directions.branches import Ask

FIELDS = {"rank": 4, "rho": 1e-2, "lr": 1e-4, "queries": 2}
SHAPES = ((3, 11), (4, 13), (5, 9))  # examples and length; none equals another size of the blocks


def made(kind: str = "llama", **fields: Any) -> tezo_ds.Engine:
    engine = tezo_ds.initialize(tiny(kind), {**FIELDS, **fields})
    engine.method.coefficients.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    return engine


def measured(engine: tezo_ds.Engine, shape: tuple[int, int], queries: int, rho: float) -> Tensor:
    """Returns the losses of all branches of one batch."""
    branches = engine.method.branches(Ask.of(shape[0], range(queries), rho))
    batch = make_batch(shape[0], seed=shape[1], length=shape[1])
    return engine.probe.measure(engine.objective, batch, branches)


def generated(engine: tezo_ds.Engine) -> list[list[int]]:
    prompt, words = make_batch(3)["input_ids"][:, :5], {"do_sample": False, "pad_token_id": 0}
    with engine.applied():
        model: Any = engine.sharding.module
        found: list[list[int]] = model.generate(prompt, max_new_tokens=3, **words).tolist()
    return found


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Counts graphs, which run as they were traced."""
    counts = CompileCounter()
    monkeypatch.setattr(blocks, "BACKEND", counts)
    return counts


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets twins run as Python code, which takes no time to compile; has a name for each call."""
    names: list[str] = []

    def noted(twin: Any, *rest: Any) -> Any:
        names.append(type(twin).__name__)
        return run(twin, *rest)

    monkeypatch.setattr(blocks, "_compiled", lambda _: noted)
    return names


@pytest.mark.slow
def test_one_graph_serves_all_blocks_steps_and_sizes(counter: CompileCounter) -> None:
    eager, engine = made("llama"), made("llama", compile=True)
    for shape, queries, rho in zip(SHAPES, (3, 1, 3), (1e-2, 1e-3, 1e-2), strict=True):
        expected = measured(eager, shape, queries, rho)
        torch.testing.assert_close(
            measured(engine, shape, queries, rho), expected, rtol=1e-5, atol=0
        )
    assert counter.frame_count == 1
    batch = make_batch(3)
    assert engine.loss(batch) == pytest.approx(eager.loss(batch), rel=1e-6)
    assert counter.frame_count == 2  # of a single branch


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_blocks_have_no_graph_breaks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []

    def explained(*given: Any) -> Any:
        if not found:
            found.append(torch._dynamo.explain(run)(*given))
        return run(*given)

    monkeypatch.setattr(blocks, "_compiled", lambda _: explained)
    measured(made(kind, compile=True), (3, 11), 2, 1e-2)
    assert (found[0].graph_count, found[0].graph_break_count) == (1, 0)


@pytest.mark.slow
def test_inductor_gives_the_losses_of_eager_steps(caplog: pytest.LogCaptureFixture) -> None:
    eager, engine = made("opt"), made("opt", compile=True)
    for seed in range(3):
        ours, expected = (e.step(make_batch(3, seed=seed)) for e in (engine, eager))
        assert ours.loss == pytest.approx(expected.loss, rel=1e-6)
        assert ours.kappa == pytest.approx(expected.kappa, rel=1e-3, abs=1e-3)
    assert not [r for r in caplog.records if r.name.startswith("tezo_ds")]


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "neox", "roberta"])
def test_twins_are_their_blocks(kind: str, traced: list[str]) -> None:
    """Several steps, periods that end beside the weights, evaluations and generation."""
    more = {"refresh_every": 2, "keep_periods": 2}
    eager, engine = made(kind, **more), made(kind, compile=True, **more)
    for seed in range(5):
        ours, expected = (e.step(make_batch(3, seed=seed)) for e in (engine, eager))
        assert ours.loss == pytest.approx(expected.loss, rel=1e-6)
        assert ours.kappa == pytest.approx(expected.kappa, rel=1e-3, abs=1e-3)
    assert len(traced) == 2 * 5
    torch.testing.assert_close(engine.method.coefficients, eager.method.coefficients)
    batch = make_batch(3)
    assert engine.loss(batch) == pytest.approx(eager.loss(batch), rel=1e-6)
    assert len(traced) == 2 * 6
    with engine.applied(), torch.no_grad():
        ours = logits(engine.sharding.module)
    with eager.applied():
        torch.testing.assert_close(ours, logits(eager.sharding.module), rtol=1e-4, atol=1e-5)
    if kind != "roberta":
        assert generated(engine) == generated(eager)
    names = {name for name, _ in engine.sharding.module.named_modules()}
    assert names == {name for name, _ in eager.sharding.module.named_modules()}


@pytest.mark.parametrize("method", ["lozo", "tezo-adam", "tezo-gn"])
def test_other_methods(method: str, traced: list[str]) -> None:
    rank = {"method": method, "rank": 2}
    eager, engine = (tezo_ds.initialize(tiny(), {**FIELDS, **rank, "compile": c}) for c in (0, 1))
    for seed in range(4):
        ours, expected = (e.step(make_batch(3, seed=seed)) for e in (engine, eager))
        assert ours.loss == pytest.approx(expected.loss, rel=1e-5)
    assert traced


def test_the_first_late_block_compiles_behind_a_trunk(traced: list[str]) -> None:
    """Two of four blocks train; the last, of which labelled positions alone are left, runs eagerly."""
    for more, calls in (({}, 3), ({"shared_trunk": False}, 6), ({"trunk_cache": "memory"}, 3)):
        eager, engine = engine_of(deep(), **more), engine_of(deep(), compile=True, **more)
        engine.settle(numbered([0, 1, 2]))
        traced.clear()
        for seed in range(3):
            batch = numbered([seed, 3, 4 + seed])
            ours, expected = (e.step(batch) for e in (engine, eager))
            assert ours.loss == pytest.approx(expected.loss, rel=1e-6)
            assert ours.kappa == pytest.approx(expected.kappa, rel=1e-3, abs=1e-3)
        assert len(traced) == calls


def test_a_hook_within_a_block_is_called(traced: list[str]) -> None:
    engine, seen = made(compile=True), []
    block = engine.sharding.module.get_submodule("model.layers.0")
    handle = block.get_submodule("mlp").register_forward_hook(lambda *_: seen.append(1))
    expected = measured(made(), (3, 11), 2, 1e-2)
    torch.testing.assert_close(measured(engine, (3, 11), 2, 1e-2), expected, rtol=1e-6, atol=0)
    assert (len(seen), len(traced)) == (1, 1)
    handle.remove()
    measured(engine, (3, 11), 2, 1e-2)
    assert (len(seen), len(traced)) == (1, 3)


def test_memory_is_measured_eagerly(traced: list[str]) -> None:
    """As a compiled graph's memory is no operator's."""
    batch = make_batch(3)
    sizes = []
    for compile in (False, True):
        engine = made(compile=compile, memory_budget=1.0)
        sizes.append(engine.measuring._measure_cost(batch, 0, 33))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"train_vectors": True}, "vectors or adapters train in LlamaRMSNorm"),
        ({"adapter": "lora"}, "no matrix of theirs trains"),
        ({"include": ["*embed*"]}, "no matrix of theirs trains"),
    ],
)
def test_what_runs_eagerly_is_named(
    fields: dict[str, Any], reason: str, traced: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        engine, eager = made(compile=True, **fields), made(**fields)
    (line,) = [r.getMessage() for r in caplog.records if "compile" in r.getMessage()]
    assert "eagerly" in line and reason in line
    assert engine.step(make_batch(3)).kappa == eager.step(make_batch(3)).kappa
    assert not traced


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        raise torch._dynamo.exc.Unsupported("a loop over experts\nand more")

    monkeypatch.setattr(blocks, "_compiled", lambda _: fail)
    return calls


def test_a_block_that_does_not_compile_is_tried_once(
    failing: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    engine, eager = made(compile=True), made()
    for seed in range(2):
        batch = make_batch(3, seed=seed)
        assert engine.step(batch).kappa == eager.step(batch).kappa
    assert len(failing) == 1
    (line,) = [r.getMessage() for r in caplog.records]
    assert line == (
        "compile: blocks LlamaDecoderLayer run eagerly (Unsupported: a loop over experts)"
    )


@pytest.mark.parametrize(
    "fields", [{"probe": "inplace"}, {"placement": "per_example"}, {"method": "mezo"}]
)
def test_refusals(fields: dict[str, Any]) -> None:
    with pytest.raises(tezo_ds.ConfigError, match="compile: is for the fused probe"):
        tezo_ds.initialize(tiny(), {**fields, "compile": True})


def test_results_of_recorded_graphs_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    modes, given_out = [], []

    def replayed(*given: Any) -> Tensor:
        """Spoils what earlier calls gave, as a graph that is replayed writes over it."""
        for tensor in given_out:
            tensor.fill_(math.nan)
        given_out[:] = [run(*given)]
        return given_out[0]

    def compiled(_: Any, mode: str | None, **__: Any) -> Any:
        modes.append(mode)
        return replayed

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(blocks, "recordable", lambda _: True)
    eager, engine = made(), made(compile=True, cuda_graphs=True)
    for seed in range(3):
        ours, expected = (e.step(make_batch(3, seed=seed)) for e in (engine, eager))
        assert ours.loss == pytest.approx(expected.loss, rel=1e-6)
    assert modes == ["reduce-overhead"] and given_out

    monkeypatch.setattr(blocks, "_copied", lambda recorded: recorded)
    spoilt = made(compile=True, cuda_graphs=True).step(make_batch(3, seed=0))
    assert spoilt.loss is None or math.isnan(spoilt.loss)


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"compile": True}, "need a CUDA GPU with whole weights"), ({}, "set compile, too")],
)
def test_graphs_that_cannot_be_recorded_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(tezo_ds.ConfigError, match=words):
        made(cuda_graphs=True, **fields)
