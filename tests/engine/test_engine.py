"""A whole run against NumPy; the linear loss; what a step refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import make_batch, tiny
from torch import nn

import tezo_ds


class Net(nn.Module):
    """A model of two layers in float64: x (B, 5) -> (B, 3)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(5, 4, bias=False, dtype=torch.float64)
        self.outer = nn.Linear(4, 3, bias=False, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(x)))


def squares(outputs: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return (outputs - batch["y"]).square().sum(dim=1), torch.full((len(outputs),), 3.0)


def data(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(6, k, generator=generator, dtype=torch.float64) for k in (5, 3))
    return {"x": x, "y": y}


SHAPES = {"inner.weight": (4, 5), "outer.weight": (3, 4)}
RANK, RHO, LR, Q, SEED = 2, 1e-2, 5e-2, 2, 9


def oracle(method: str, steps: int) -> tuple[dict[str, np.ndarray], list[float]]:
    """Runs TeZO and TeZO-m as the paper writes them, dense, in NumPy."""
    W = {name: tensor.numpy() for name, tensor in Net().state_dict().items()}
    UV = {
        k: [f.double().numpy() for f in tezo_ds.factors(k, s, RANK, SEED)]
        for k, s in SHAPES.items()
    }
    a = {k: np.zeros(RANK) for k in SHAPES}
    m = {k: np.zeros(RANK) for k in SHAPES}
    losses = []

    def loss(c: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray) -> float:
        w = {k: W[k] + UV[k][0] @ np.diag(c[k]) @ UV[k][1].T for k in SHAPES}
        return float(((np.tanh(x @ w["inner.weight"].T) @ w["outer.weight"].T - y) ** 2).mean())

    for t in range(steps):
        x, y = (v.numpy() for v in data(t).values())
        taus = [
            {k: tezo_ds.tau(k, RANK, SEED, t, q).double().numpy() for k in SHAPES} for q in range(Q)
        ]
        L = [
            [loss({k: a[k] + s * RHO * tau[k] for k in SHAPES}, x, y) for s in (1, -1)]
            for tau in taus
        ]
        for k in SHAPES:
            g = sum((p - n) / (2 * RHO) * tau[k] for (p, n), tau in zip(L, taus, strict=True)) / Q
            m[k] = 0.8 * m[k] + 0.2 * g if method == "tezo-m" else g
            a[k] = a[k] - LR * m[k]
        losses.append(float(np.mean(L)))
    return a, losses


@pytest.mark.parametrize("probe", ["fused", "inplace"])
@pytest.mark.parametrize("method", ["tezo", "tezo-m"])
def test_twenty_steps_are_those_of_the_numpy_oracle(method: str, probe: str) -> None:
    config = {
        "method": method, "probe": probe, "rank": RANK, "rho": RHO, "lr": LR, "queries": Q,
        "seed": SEED, "momentum": 0.8,
    }  # fmt: skip
    engine = tezo_ds.initialize(Net(), config, squares)
    losses = [engine.step(data(t)).loss for t in range(20)]
    expected, expected_losses = oracle(method, 20)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-9)
    for name, a in engine.coefficients().items():
        assert a.dtype == torch.float64 and np.abs(expected[name]).max() > 1e-2
        np.testing.assert_allclose(a, expected[name], rtol=1e-7)
    merged = engine.state_dict()
    engine.merge()
    for name, tensor in engine.sharding.module.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["tezo", "tezo-m"])
@pytest.mark.parametrize("probe", ["fused", "inplace"])
def test_on_a_linear_loss_the_step_is_along_what_was_measured(probe: str, method: str) -> None:
    """κ = ⟨G, Z⟩ and ⟨G, Δ⟩ = -η κ² at every step; with momentum, Δ is -η times the mean of κZ that β₁
    gives."""
    model = nn.Linear(7, 5, bias=False, dtype=torch.float64)
    G = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def linear(outputs: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        return (outputs * batch["g"]).sum(dim=1), torch.full((len(outputs),), 1 / 7)

    config = {"rank": 3, "rho": 1e-2, "lr": 1e-3, "probe": probe, "method": method, "seed": 4}
    engine = tezo_ds.initialize(model, config, linear)
    U, V = (f.double() for f in tezo_ds.factors("weight", (5, 7), 3, 4))
    batch = {"input": torch.eye(7, dtype=torch.float64), "g": G.t().contiguous()}
    a = torch.zeros(3, dtype=torch.float64)
    gradients = []
    for step in range(12):
        (kappa,) = engine.step(batch).kappa
        tau = tezo_ds.tau("weight", 3, 4, step, 0).double()
        Z = U @ torch.diag(tau) @ V.t()
        assert kappa == pytest.approx((G * Z).sum().item(), rel=1e-6)
        delta = engine.coefficients()["weight"] - a
        a = engine.coefficients()["weight"]
        gradients.append(kappa * tau)
        if method == "tezo":
            change = U @ torch.diag(delta) @ V.t()
            assert (G * change).sum().item() / kappa**2 == pytest.approx(-1e-3, rel=1e-6)
        weights = [0.1 * 0.9 ** (step - s) for s in range(step + 1)]
        m = sum(w * g for w, g in zip(weights, gradients, strict=True))
        expected = -1e-3 * (m if method == "tezo-m" else gradients[-1])
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-12)


def test_the_loss_is_the_mean_over_labelled_positions_as_transformers_has_it() -> None:
    for kind in ("llama", "opt", "neox", "gpt2"):
        model, batch = tiny(kind), make_batch(5)
        engine = tezo_ds.initialize(model, {"rank": 2})
        with torch.no_grad():
            expected = model(**batch).loss.item()
        assert engine.loss(batch) == pytest.approx(expected, rel=1e-5)
    model = tiny("roberta")
    engine = tezo_ds.initialize(model, {"rank": 2})
    with torch.no_grad():
        assert engine.loss(batch) == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_a_report_says_what_was_done() -> None:
    config = {"rank": 2, "lr": 1e-3, "schedule": "linear", "warmup_steps": 2, "total_steps": 6}
    engine = tezo_ds.initialize(tiny(), {**config, "queries": 3})
    batch = make_batch(4)
    reports = [engine.step(batch) for _ in range(7)]
    assert [r.step for r in reports] == list(range(7))
    assert [r.lr for r in reports] == pytest.approx([5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 2.5e-4, 0.0])
    assert all(len(r.kappa) == 3 and r.seconds > 0 for r in reports)
    assert reports[0].tokens == int(batch["attention_mask"].sum())


def constant(outputs: object, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(len(batch["input_ids"])), torch.ones(len(batch["input_ids"]))


def not_a_number(outputs: object, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    loss, count = constant(outputs, batch)
    return loss * float("nan"), count


def test_a_batch_that_is_answered_with_certainty_moves_nothing() -> None:
    none, little = (0.0, 0.0), (1.2e-7, 1.2e-7)
    losses = iter([none, none, little, none, (1.0, 0.5), none, little, little, none, little])

    def loss(outputs: object, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        half = len(batch["input_ids"]) // 2
        return torch.tensor(next(losses)).repeat_interleave(half), torch.ones(2 * half)

    engine = tezo_ds.initialize(tiny(), {"rank": 2, "probe": "fused"}, loss)
    reports = [engine.step(make_batch(3)) for _ in range(9)]
    assert [bool(report.kappa[0]) for report in reports] == [i == 4 for i in range(9)]
    with pytest.raises(
        tezo_ds.ProbeError, match=r"step 9: all 2 branches give the same loss 1.2e-07"
    ):
        engine.step(make_batch(3))


@pytest.mark.parametrize("probe", ["fused", "inplace"])
def test_a_probe_that_measured_nothing_is_loud(probe: str) -> None:
    config, batch = {"rank": 2, "probe": probe}, make_batch(3)
    with pytest.raises(
        tezo_ds.ProbeError, match=r"same loss 1, so nothing was measured; raise rho"
    ):
        tezo_ds.initialize(tiny(), config, constant).step(batch)
    engine = tezo_ds.initialize(tiny(), config, not_a_number)
    for _ in range(4):
        report = engine.step(batch)
        assert report.dropped == 1 and math.isnan(report.kappa[0]) and math.isnan(report.loss)
    failed = r"step 4: loss is nan in 2 of 2 branches, the 5th step in a row with such; lower lr"
    with pytest.raises(tezo_ds.ProbeError, match=failed):
        engine.step(batch)
    assert engine.step_index == 4 and not engine.method.coefficients.any()
    unlabelled = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(tezo_ds.ProbeError, match="no position of the batch carries a label"):
        tezo_ds.initialize(tiny(), config).step(unlabelled)
    with pytest.raises(tezo_ds.DataError, match='batch has no "labels"'):
        tezo_ds.initialize(tiny(), config).step({"input_ids": batch["input_ids"]})


def test_dropout_is_off_even_if_someone_turns_it_on() -> None:
    model = tiny("opt")
    engine = tezo_ds.initialize(model, {"rank": 2})
    batch = make_batch(3)
    first = engine.loss(batch)
    model.train()
    assert engine.loss(batch) == first and not model.training


def test_selection_names_counts_and_refuses() -> None:
    model = tiny("llama", tied=True)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    engine = tezo_ds.initialize(model, {"rank": 2, "exclude": ["*embed*"]})
    selection = engine.selection
    assert len(selection.matrices) == 13 and engine.space.numel == 26
    assert selection.frozen == {
        "vectors (biases, norms); see train_vectors": 5,
        "left out by include or exclude": 1,
        "requires_grad is False": 1,
    }
    total = selection.trainable_numel + selection.frozen_numel
    assert total == sum(p.numel() for p in model.parameters())
    engine = tezo_ds.initialize(tiny(), {"rank": 2, "train_vectors": True, "exclude": ["*proj*"]})
    assert [matrix.name for matrix in engine.selection.matrices] == ["model.embed_tokens.weight"]
    assert [vector.numel for vector in engine.selection.vectors] == [22] * 5
    assert engine.space.numel == 2 + 5 * 22
    assert engine.selection.frozen == {"left out by include or exclude": 14}
    with pytest.raises(tezo_ds.ConfigError, match="no parameter trains"):
        tezo_ds.initialize(tiny(), {"rank": 2, "include": ["*.nothing"]})


def test_coefficients_load_only_where_they_belong() -> None:
    engine = tezo_ds.initialize(tiny(), {"rank": 2, "lr": 1e-3})
    engine.step(make_batch(3))
    saved = engine.coefficients()
    other = tezo_ds.initialize(tiny(), {"rank": 2})
    other.load_coefficients(saved)
    assert other.loss(make_batch(3)) == engine.loss(make_batch(3))
    with pytest.raises(tezo_ds.ConfigError, match="2 coefficients, but rank is 3"):
        tezo_ds.initialize(tiny(), {"rank": 3}).load_coefficients(saved)
    with pytest.raises(tezo_ds.ConfigError, match="differ in 1 parameters"):
        tezo_ds.initialize(tiny(), {"rank": 2, "exclude": ["*embed*"]}).load_coefficients(saved)


def test_choices_make_the_loss_a_pick_among_words() -> None:
    """Cross-entropy is taken over the words to choose from alone, in both probes and in scores."""
    batch = make_batch(4)
    choices = torch.tensor([7, 30, 11])
    labelled = batch["labels"] != -100
    batch["labels"][labelled] = choices[batch["labels"][labelled] % 3]
    model = tiny()
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    wanted = batch["labels"][:, 1:]
    place = (wanted[..., None] == choices).int().argmax(dim=-1)[wanted != -100]
    rows = logits[:, :-1][wanted != -100][:, choices]
    expected = torch.nn.functional.cross_entropy(rows, place).item()
    for probe in ("fused", "inplace"):
        engine = tezo_ds.initialize(model, {"rank": 2, "probe": probe})
        assert engine.loss(batch) > 2.5  # among 61 words
        engine.objective.choices = choices
        assert engine.loss(batch) == pytest.approx(expected, rel=1e-5) and expected < 2
        assert engine.step(batch).loss == pytest.approx(expected, rel=1e-3)
        _, losses, _ = engine.objective.score(batch)
        assert losses.mean().item() == pytest.approx(expected, rel=1e-5)
    engine.objective.choices = choices[:2]
    with pytest.raises(tezo_ds.DataError, match=r"label token 11 is none of the choices \[7, 30\]"):
        engine.loss(batch)


@pytest.mark.parametrize("probe", ["fused", "inplace"])
def test_steps_may_be_taken_in_inference_mode(probe: str) -> None:
    engines = [tezo_ds.initialize(tiny(), {"rank": 2, "probe": probe}) for _ in range(2)]
    for step in range(3):
        batch = make_batch(3, seed=step)
        with torch.inference_mode():
            inside = engines[0].step(batch).loss
        assert inside == engines[1].step(batch).loss
    assert engines[0].loss(batch) == engines[1].loss(batch)
