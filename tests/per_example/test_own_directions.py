"""Directions of each example's own, in one process: against a loop, and against the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from deep import BEHIND, LATE, deep
from own_directions import ORACLE, OWN, labelled, oracle, ragged, slopes_in_a_loop
from tiny import make_batch, tiny
from torch import nn

import tezo_ds
from tezo_ds.losses import head

CUTS = (
    {},
    {"branch_chunk": 1},
    {"branch_chunk": 3},
    {"micro_batch": 2},
    {"micro_batch": 3, "branch_chunk": 1},
)


def assert_the_loop(make, batch: dict, fields: dict) -> tezo_ds.Engine:
    expected = slopes_in_a_loop(make, batch, fields)
    engine = tezo_ds.initialize(make(), fields)
    engine.objective.first = None
    found = engine.step(batch).kappa
    assert len(found) == fields["queries"] * len(labelled(batch))
    torch.testing.assert_close(found, tuple(expected), rtol=2e-3, atol=2e-3)
    assert len(set(found)) == len(found)
    return engine


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "neox", "roberta"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_each_example_sees_its_own_directions(kind: str, tied: bool, cut: dict) -> None:
    if cut and (kind, tied) not in (("llama", True), ("opt", False)):
        return
    for examples in (7, 1):
        assert_the_loop(lambda: tiny(kind, tied), ragged(examples), {**OWN, **cut})


@pytest.mark.parametrize("chunk", [1, 100])
def test_a_trained_output_layer_tells_labelled_positions_apart(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of the output layer begin and end within an example."""
    monkeypatch.setattr(head, "CHUNK_NUMEL", 61 * 4 * 4 * chunk)
    fields = {**OWN, "include": ("*embed*", "lm_head*")}
    assert_the_loop(lambda: tiny("llama", False), ragged(7), fields)


class Doubled(nn.Module):
    """A model that changes its output layer's result, which is tried out on one example a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny("llama", False)

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.lm_head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(input_ids, attention_mask=attention_mask, use_cache=False).logits


def test_an_output_layer_that_is_tried_out_first() -> None:
    engine = assert_the_loop(Doubled, ragged(7), OWN)
    assert engine.objective.head_mode == "chosen"


@pytest.mark.parametrize("kind", ["llama", "opt", "neox"])
@pytest.mark.parametrize(
    "more", [{}, {"micro_batch": 2}, {"branch_chunk": 3}, {"shared_trunk": False}], ids=str
)
def test_a_frozen_trunk_and_labelled_rows_alone_behind_the_last_attention(
    kind: str, more: dict
) -> None:
    layers = {"llama": ("*.2.*", "*.3.*"), "opt": LATE, "neox": LATE}[kind]
    include = (*layers, "lm_head*", "embed_out*")
    fields = {**OWN, "include": layers, **more, "train_vectors": kind == "opt"}
    engine = assert_the_loop(lambda: deep(kind, False), ragged(7), fields)
    assert (engine.objective.trunk is None) == ("shared_trunk" in more)
    if engine.objective.trunk is not None:
        assert engine.objective.trunk.found is not None
        assert (
            engine.objective.trunk.rest.way.tail is not None
            and engine.objective.trunk.rest.way.tail.last is not None
        )
    assert_the_loop(lambda: deep(kind, False), ragged(7), {**fields, "include": include})


@pytest.mark.parametrize("more", [{}, {"micro_batch": 2}, {"branch_chunk": 3}], ids=str)
def test_rows_that_begin_behind_an_attention_which_all_examples_have_in_common(more: dict) -> None:
    for kind in ("llama", "opt", "neox"):
        fields = {**OWN, "include": BEHIND[kind], "train_vectors": True, **more}
        engine = assert_the_loop(lambda kind=kind: deep(kind, False), ragged(7), fields)
        assert engine.objective.trunk is not None
        tail = engine.objective.trunk.rest.way.tail
        assert tail is not None and tail.alike


@pytest.mark.parametrize(
    "more",
    [
        {"difference": "forward"}, {"difference": "forward", "branch_chunk": 1}, {"train_vectors": True},
        {"method": "lozo"}, {"method": "lozo-m", "branch_chunk": 1, "train_vectors": True},
        {"method": "tezo-adam"}, {"queries": 1},
    ],
    ids=str,
)  # fmt: skip
def test_methods_differences_and_vectors(more: dict) -> None:
    for kind in ("llama", "opt", "gpt2"):
        assert_the_loop(lambda kind=kind: tiny(kind), ragged(6), {**OWN, **more})


def test_a_loss_of_ones_own_by_example() -> None:
    def own(outputs, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        losses = outputs.logits.float().square().mean(dim=(1, 2))
        return losses, torch.ones(len(losses))

    batch = {k: v for k, v in make_batch(5).items() if k != "labels"}
    for queries in (1, 2):
        engine = tezo_ds.initialize(tiny(), {**OWN, "queries": queries}, own)
        assert len(engine.step(batch).kappa) == 5 * queries
    one = tezo_ds.initialize(tiny(), {**OWN, "placement": "shared"}, own)
    assert engine.step_index == 1
    first = one.step({k: v[:1] for k, v in batch.items()}).kappa  # whose directions are example 0's
    again = tezo_ds.initialize(tiny(), OWN, own).step(batch)
    torch.testing.assert_close(again.kappa[:2], first, rtol=1e-3, atol=1e-4)
    with pytest.raises(tezo_ds.DataError, match="labels are all -100") as caught:
        tezo_ds.initialize(tiny(), OWN, own).step({**batch, "labels": ragged(5)["labels"]})
    assert "\n" not in str(caught.value)


STEPS = 6


def test_every_method_is_the_oracle() -> None:
    for method, more in ORACLE.items():
        fields = {**OWN, "method": method, **more}
        engine = tezo_ds.initialize(tiny("gpt2", False), fields)
        for step in range(STEPS):
            engine.step(ragged(6, step))
        before, merged = tiny("gpt2", False).state_dict(), engine.state_dict()
        for name, expected in oracle(tiny("gpt2", False), ragged, 6, method, fields, STEPS).items():
            change = expected - before[name]
            scale = change.abs().max().item()
            off = (merged[name].double() - before[name] - change).abs().max().item()
            assert scale > 1e-4 and off < 0.02 * scale, f"{method}, {name}: off by {off} of {scale}"


def test_what_cannot_have_directions_of_examples_own_is_refused_in_one_line() -> None:
    for fields, message in (
        ({"probe": "inplace"}, "placement: per_example needs the fused probe"),
        ({"method": "mezo"}, "placement per_example needs the fused probe"),
        ({"method": "tezo-gn"}, "placement: tezo-gn needs all branches"),
        ({"method": "lozo", "memory_budget": 1.0}, "memory_budget: does not know"),
    ):
        with pytest.raises(tezo_ds.ConfigError, match=message) as caught:
            tezo_ds.initialize(tiny(), {**OWN, "rank": 2, **fields})
        assert "\n" not in str(caught.value)
    nothing = ragged(4)
    nothing["labels"][:] = -100
    with pytest.raises(tezo_ds.ProbeError, match="no position of the batch carries a label"):
        tezo_ds.initialize(tiny(), OWN).step(nothing)


def test_an_example_that_fails_costs_its_own_directions_alone() -> None:
    def own(outputs, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        losses = outputs.logits.float().square().mean(dim=(1, 2)).clone()
        losses[3] = math.nan  # example 3 of 5, + of its first direction
        return losses, torch.ones(len(losses))

    engine = tezo_ds.initialize(tiny(), OWN, own)
    report = engine.step({k: v for k, v in make_batch(5).items() if k != "labels"})
    assert [q for q, kappa in enumerate(report.kappa) if math.isnan(kappa)] == [6]
    assert engine.method.coefficients.any() and report.dropped == 1


def test_a_run_is_replayed_to_the_bit() -> None:
    for more in (
        {},
        {"method": "lozo", "nu": 2},
        {"method": "tezo-adam-coef", "clip_kappa": 0.9, "normalize": "std"},
    ):
        engine = tezo_ds.initialize(tiny(), {**OWN, **more})
        reports = [engine.step(ragged(5 + step, step)) for step in range(5)]
        again = tezo_ds.initialize(tiny(), {**OWN, **more})
        for report in reports:
            again.replay(report.step, report.kappa, report.lr, report.rho)
        for name, packed in engine.method.state.items():
            assert torch.equal(again.method.state[name].data, packed.data), (more, name)
