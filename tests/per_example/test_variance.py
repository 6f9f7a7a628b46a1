"""The mean square error of a step's estimate: (S/B + s)(D+1) with directions of each example's own, beside
(S + s)(D+1) with one that all share; and the estimate's mean, which is the gradient either way."""

from __future__ import annotations

import pytest
import torch
from own_directions import labelled
from parts.directions.gradient import differentiable
from tiny import make_batch, tiny
from torch import Tensor, nn

import tezo_ds

STEPS = 300
FIELDS = {"rank": 2, "rho": 1e-3, "lr": 0.0, "include": ("*q_proj*", "*down_proj*"), "seed": 3}


def alike(examples: int) -> dict[str, Tensor]:
    """Returns a batch whose examples agree for the most part."""
    batch = {key: value[:1].repeat(examples, 1) for key, value in make_batch(1, length=12).items()}
    for row in range(examples):
        batch["input_ids"][row, row % 3] = 5 + row
    return batch


def gradients(engine: tezo_ds.Engine, batch: dict[str, Tensor]) -> Tensor:
    """Returns ∇ℓ_i of each example by backpropagation, ℓ_i its loss sum times R / N: float64 (R, D)."""
    rows, wanted = labelled(batch), batch["labels"][:, 1:]
    count = int((wanted != -100).sum())
    found = []
    for row in rows:
        with torch.enable_grad(), differentiable(engine) as leaf:
            logits = engine.sharding.module(
                input_ids=batch["input_ids"][row : row + 1],
                attention_mask=batch["attention_mask"][row : row + 1],
            ).logits
            loss = nn.functional.cross_entropy(
                logits[0, :-1], wanted[row], ignore_index=-100, reduction="sum"
            )
            (gradient,) = torch.autograd.grad(loss * len(rows) / count, leaf)
        found.append(gradient.double())
    return torch.stack(found)


def errors(batch: dict[str, Tensor], placement: str, queries: int) -> tuple[float, float, Tensor]:
    """Returns the mean over steps of ‖g - ∇‖², ‖the mean of g - ∇‖², and each example's gradient."""
    engine = tezo_ds.initialize(
        tiny("llama", False), {**FIELDS, "placement": placement, "queries": queries}
    )
    engine.objective.first = None
    each = gradients(engine, batch)
    true, total, squares = each.mean(dim=0), torch.zeros(engine.space.numel).double(), 0.0
    for step in range(STEPS):
        kappa = torch.tensor(engine.step(batch).kappa, dtype=torch.float64)
        taus = engine.space.taus(step, range(len(kappa))).double()
        g = (kappa[:, None] * taus).mean(dim=0)
        total += g / STEPS
        squares += (g - true).square().sum().item() / STEPS
    return squares, (total - true).square().sum().item(), each


@pytest.mark.slow
@pytest.mark.parametrize(("of", "queries"), [(alike, 1), (make_batch, 2)])
def test_the_error_is_what_theory_says(of, queries: int) -> None:
    batch = of(6)
    found = {}
    for placement in ("shared", "per_example"):
        error, bias, each = errors(batch, placement, queries)
        B, D = each.shape
        S = each.mean(dim=0).square().sum().item()
        s = (each - each.mean(dim=0)).square().sum().item() / B**2
        # Of a given batch: S is of its own gradient, and so has s in it already.
        theory = {"shared": S, "per_example": S / B + s}
        found[placement] = theory[placement] * (D + 1) / queries
        assert error == pytest.approx(found[placement], rel=0.2), placement
        assert bias < 2 * error / STEPS, f"{placement}: the estimate is not of the gradient"
    # so that a run that had the other placement would fail above
    assert found["shared"] > 1.5 * found["per_example"]
