"""Accuracy and F1 as objectives: each branch's, against dense perturbed weights and metrics by hand."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Given, Run, call
from picking import WORDS, loss_by_hand, picking
from test_resume import kappas, killed_after, same
from tiny import tiny
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import tezo_ds
from tezo_ds.errors import ProbeError
from tezo_ds.losses.metric import class_counts, counted, loss_of, wrong
from tezo_ds.trunk.trunk import Trunk

pytest_plugins = ("cli_fixtures",)
FIELDS: dict[str, Any] = {"rank": 2, "rho": 0.05, "lr": 0.1, "queries": 3, "seed": 5}


def engine_of(metric: str, model: nn.Module | None = None, **fields: Any) -> tezo_ds.Engine:
    engine = tezo_ds.initialize(model or tiny(), {**FIELDS, **fields})
    engine.objective.choices, engine.objective.metric = WORDS, metric
    return engine


@torch.no_grad()
def loss_at(model: nn.Module, batch: dict[str, torch.Tensor], metric: str) -> float:
    logits = model(batch["input_ids"]).logits[:, -2, WORDS]
    right = (batch["labels"][:, -1:] == WORDS).int().argmax(dim=1)
    return loss_by_hand(logits.argmax(dim=1).tolist(), right.tolist(), metric)


def slopes_by_hand(
    engine: tezo_ds.Engine, batch: dict[str, torch.Tensor], metric: str
) -> list[float]:
    """κ of a step from models whose weights were changed as matrices."""
    found = []
    for direction in range(FIELDS["queries"]):
        losses = []
        for sign in (1, -1):
            model = copy.deepcopy(engine.sharding.module)
            weights = dict(model.named_parameters())
            for matrix in engine.selection.matrices:
                U, V = tezo_ds.factors(matrix.name, matrix.shape, 2, FIELDS["seed"])
                tau = tezo_ds.tau(matrix.name, 2, FIELDS["seed"], engine.step_index, direction)
                c = engine.coefficients()[matrix.name] + sign * FIELDS["rho"] * tau.double()
                weights[matrix.name].data += ((U * c) @ V.double().t()).float()
            losses.append(loss_at(model, batch, metric))
        found.append((losses[0] - losses[1]) / (2 * FIELDS["rho"]))
    return found


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_each_branch_is_judged_by_the_metric_of_the_batch(metric: str) -> None:
    ways: tuple[dict[str, Any], ...] = (
        {},
        {"probe": "inplace"},
        {"branch_chunk": 4, "micro_batch": 3},
    )
    engines = [engine_of(metric, **way) for way in ways]
    several: set[float] = set()
    for step in range(3):
        batch = picking(8, seed=step)
        by_hand = slopes_by_hand(engines[0], batch, metric)
        several |= set(by_hand)
        for engine in engines:
            if step == 0:
                expected = loss_at(engine.sharding.module, batch, metric)
                assert engine.loss(batch) == pytest.approx(expected)
            assert list(engine.step(batch).kappa) == pytest.approx(by_hand, abs=1e-9)
            assert torch.equal(engine.method.coefficients, engines[0].method.coefficients)
    assert len(several) > 3


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_a_trunk_is_tried_by_losses(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of two examples would be the same of most forwards that a split has broken."""
    compared: list[torch.Tensor] = []
    same = Trunk._same

    def watched(trunk: Trunk, plain: torch.Tensor, split: torch.Tensor) -> bool:
        compared.append(plain[0])
        return same(trunk, plain, split)

    monkeypatch.setattr(Trunk, "_same", watched)
    engine, batch = engine_of(metric, include=["last:1"]), picking(8)
    by_hand = slopes_by_hand(engine, batch, metric)
    assert list(engine.step(batch).kappa) == pytest.approx(by_hand, abs=1e-9)
    assert compared and not any(bool((sums == sums.round()).any()) for sums in compared)
    assert engine.objective.trunk is not None and engine.objective.trunk.found is not None


def test_examples_of_their_own_directions_are_right_or_wrong() -> None:
    found = engine_of("accuracy", placement="per_example", rho=0.3).step(picking(8)).kappa
    assert len(found) == 24 and {round(abs(kappa) * 0.6, 6) for kappa in found} == {0.0, 1.0}


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_equal_branches_are_no_error_of_a_metric(metric: str) -> None:
    engine = engine_of(metric, rho=1e-7)
    assert engine.step(picking(8)).kappa == (0.0, 0.0, 0.0)
    assert engine.step_index == 1 and not engine.method.coefficients.any()
    engine.objective.metric = None
    for matrix in engine.space.slices:
        engine.sharding.module.get_parameter(matrix).data.zero_()
    with pytest.raises(ProbeError, match="all 6 branches give the same loss"):
        engine.step(picking(8))


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_logits_that_are_not_finite_fail_a_branch(metric: str) -> None:
    """The largest logit is found among those that are no numbers, too: without its handling the branch would
    be judged by it."""
    words, right = torch.randn(3, 5, 4), torch.tensor([0, 1, 3, 3, 1])
    words[1, 2, 0] = math.nan
    words[2, 4, 1] = math.inf
    count = class_counts if metric == "f1" else wrong
    sums = count(words, right).sum(dim=1).t() if metric == "f1" else None
    if sums is None:
        missed = wrong(words, right)
        sums = torch.stack([missed.sum(dim=1), torch.full((3,), 5.0)])
    assert loss_of(sums, metric).isnan().tolist() == [False, True, True]
    assert counted(sums, metric).tolist() == [5, 5, 5]


def test_f1_of_classes_adds_up_over_parts() -> None:
    generator = torch.Generator().manual_seed(2)
    words, right = (
        torch.randn(2, 11, 5, generator=generator),
        torch.tensor([0, 0, 1, 3] * 2 + [0, 1, 1]),
    )
    sums = [class_counts(words[:, p], right[p]).sum(dim=1).t() for p in (slice(4), slice(4, 11))]
    found = loss_of(sums[0] + sums[1], "f1")
    for branch in range(2):
        picked = words[branch].argmax(dim=1).tolist()
        assert found[branch].item() == pytest.approx(loss_by_hand(picked, right.tolist(), "f1"))
    means = sum(loss_of(part, "f1") * n / 11 for part, n in zip(sums, (4, 7), strict=True))
    assert not torch.allclose(means, found, atol=1e-3), "or a mean would do"


def test_classes_of_a_model_that_classifies() -> None:
    config = LlamaConfig(
        vocab_size=61, hidden_size=22, num_hidden_layers=1, num_attention_heads=2, intermediate_size=37,
        num_labels=3, pad_token_id=0, initializer_range=0.3, head_dim=10,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    batch = {"input_ids": picking(8)["input_ids"], "labels": torch.tensor([0, 1, 2, 0, 1, 0, 1, 0])}
    with torch.no_grad():
        picked = model(batch["input_ids"]).logits.argmax(dim=1).tolist()
    for metric in ("accuracy", "f1"):
        engine = tezo_ds.initialize(model, FIELDS)
        engine.objective.metric = metric
        expected = loss_by_hand(picked, batch["labels"].tolist(), metric)
        assert engine.loss(batch) == pytest.approx(expected) and 0 < expected < 1


def test_a_run_resumes_and_is_replayed(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plain, run, made = tmp_path / "plain", tmp_path / "run", tmp_path / "made.safetensors"
    options = {"objective": "f1", "rho": 0.3, "lr": 0.01, "queries": 3, "check_every": 2}
    assert call(*given.train(plain, **options)) == 0
    killed_after(3, given.train(run, **options), monkeypatch)
    assert call(*given.train(run, **options)) == 0
    assert kappas(run) == kappas(plain) and same(run, plain)
    assert any(any(step) for step in kappas(run))
    assert call("replay", run, "--verify", "--coefficients", made) == 0
    assert "3 digests agree" in capfd.readouterr().out
    assert call(*given.train(run, **{**options, "objective": "accuracy"})) == 2
    assert "holds a run of objective 'f1', not 'accuracy'" in capfd.readouterr().err
    assert Run(run).summary["status"] == "finished"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "accuracy", "rho": "auto"}, "rho auto: is chosen by how a loss bends"),
        ({"objective": "f1", "method": "tezo-gn"}, "method tezo-gn: solves for the cross-entropy"),
        ({"objective": "f1", "placement": "per_example"}, "one example has no F1"),
        ({"objective": "accuracy", "include": "auto"}, "layers are measured by slopes"),
        ({"objective": "f1", "verbalizers": '{"bad": "a b c", "mixed": "a b d", "good": "a b e"}'},
         "--objective f1 needs words of one token each"),
    ],
)  # fmt: skip
def test_what_needs_a_loss_is_refused(
    given: Given,
    options: dict[str, str],
    words: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert call(*given.train(tmp_path / "run", **options)) == 2
    assert words in capfd.readouterr().err
