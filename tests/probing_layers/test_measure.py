"""What is measured of each matrix, held against backpropagated values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deep import data, deep
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import tezo_ds
from tezo_ds.directions.lowrank import FixedFactors
from tezo_ds.directions.space import CoefficientSpace
from tezo_ds.errors import ProbeError
from tezo_ds.probing_layers.measure import Asked, Measured, measure
from tezo_ds.probing_layers.names import bands_of

RANK, EXAMPLES, SEED = 3, 7, 5
WORDS = torch.tensor([*range(5, 61)])
Losses = Callable[[Tensor, Tensor], Tensor]


def bands(engine: tezo_ds.Engine, together: int = 1) -> list[Any]:
    names = [name for name, _ in engine.sharding.module.named_parameters()]
    return bands_of(engine.space.matrices, names, together)


def measured(
    model: nn.Module,
    rho: float,
    columns: int = RANK,
    choices: bool = False,
    together: int = 1,
    **fields: object,
) -> tuple[tezo_ds.Engine, list[Measured]]:
    """Measures a model on examples with several labels each, in batches of four and three."""
    given = {"rank": RANK, "seed": SEED, "include": ["*layers*"], **fields}
    engine = tezo_ds.initialize(model, given)
    engine.objective.choices = WORDS if choices else None
    batch = data(EXAMPLES)
    parts = [{k: v[:4] for k, v in batch.items()}, {k: v[4:] for k, v in batch.items()}]
    batches = [(parts[0], 0), (parts[1], 4)]
    asked = Asked(bands(engine, together), SEED, batches, EXAMPLES, columns, rho, 5)
    return engine, measure(engine.sharding, engine.objective, asked)


def backpropagated(engine: tezo_ds.Engine, choices: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns, by matrix, each example's gradient and its Hessian's diagonal in the coefficients, (n, r), by
    double backward through weights that are W + U diag(a) Vᵀ, all matrices' at once."""
    model, batch, matrices = engine.sharding.module, data(EXAMPLES), engine.space.matrices
    weights = {name: p.detach() for name, p in model.named_parameters()}
    made = FixedFactors(CoefficientSpace(matrices, SEED))
    factors = {matrix.name: made.of(matrix.name) for matrix in matrices}
    wanted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    scale = EXAMPLES / (wanted != -100).sum()

    def loss(a: Tensor, i: int) -> Tensor:
        changed = dict(weights)
        for row, (name, (U, V)) in zip(a, factors.items(), strict=True):
            changed[name] = weights[name] + (U * row) @ V.T
        inputs = {k: v[i : i + 1] for k, v in batch.items() if k != "labels"}
        logits = torch.func.functional_call(model, changed, kwargs=inputs).logits[0]
        labels = wanted[i]
        if choices:
            logits = logits[:, WORDS]
            labels = torch.where(labels < 0, -100, labels - 5)
        return F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100) * scale

    gradients, diagonals = [], []
    for i in range(EXAMPLES):
        a = torch.zeros(len(matrices), RANK, dtype=made.of(matrices[0].name)[0].dtype)
        a.requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            value = loss(a, i)
        (g,) = torch.autograd.grad(value, a, create_graph=True)
        each = torch.eye(a.numel(), dtype=a.dtype).view(-1, *a.shape)
        (hessian,) = torch.autograd.grad(g, a, each, is_grads_batched=True)
        gradients.append(g.detach())
        diagonals.append(hessian.view(a.numel(), -1).diagonal().view_as(a))
    g, d = torch.stack(gradients, dim=1), torch.stack(diagonals, dim=1)  # (matrices, n, r)
    return {matrix.name: (g[at], d[at]) for at, matrix in enumerate(matrices)}


@pytest.fixture
def wide_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's norms go by way of float32, whose rounding would hide what is compared."""

    def forward(norm: Any, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        return norm.weight * (x * scale)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.mark.usefixtures("wide_norms")
@pytest.mark.parametrize("choices", [False, True])
def test_in_float64_they_are_the_backpropagated_values(choices: bool) -> None:
    engine, ours = measured(deep().double(), 1e-5, choices=choices)
    theirs = backpropagated(engine, choices)
    assert [one.group[0].name for one in ours] == [m.name for m in engine.space.matrices]
    assert len(ours) == 28
    for one in ours:
        gradient, diagonal = theirs[one.group[0].name]
        scale = float(gradient.abs().max())
        torch.testing.assert_close(one.slopes / RANK**0.5, gradient, rtol=1e-6, atol=1e-6 * scale)
        curved = float(diagonal.abs().max())
        torch.testing.assert_close(one.bends / RANK, diagonal, rtol=1e-4, atol=1e-4 * curved)


def test_in_float32_they_are_close() -> None:
    engine, (one, *_) = measured(deep(), 5e-3)
    gradient, diagonal = backpropagated(engine, False)[one.group[0].name]
    assert float((one.slopes / RANK**0.5 - gradient).norm() / gradient.norm()) < 0.02
    assert float((one.bends / RANK - diagonal).norm() / diagonal.norm()) < 0.1


def test_fewer_columns_are_the_first_of_all() -> None:
    _, every = measured(deep(), 5e-3)
    _, few = measured(deep(), 5e-3, columns=2)
    for one, part in zip(every, few, strict=True):
        torch.testing.assert_close(one.slopes[:, :2], part.slopes, rtol=1e-3, atol=2e-3)


def test_without_a_trunk_they_are_the_same() -> None:
    engine, ours = measured(deep(), 5e-3)
    before = engine.objective.trunk
    batch = data(EXAMPLES)
    asked = Asked(bands(engine), SEED, [(batch, 0)], EXAMPLES, RANK, 5e-3, 64, trunk=False)
    whole = measure(engine.sharding, engine.objective, asked)
    assert engine.objective.trunk is before
    for one, other in zip(ours, whole, strict=True):
        torch.testing.assert_close(one.slopes, other.slopes, rtol=1e-3, atol=2e-3)


def test_matrices_that_move_together_add_up() -> None:
    _, ours = measured(deep(), 5e-4)
    _, together = measured(deep(), 5e-4, together=2)
    assert [len(one.group) for one in together] == [2] * 14
    alone = {one.group[0].name: one for one in ours}
    for one in together:
        parts = [alone[matrix.name].slopes for matrix in one.group]
        expected = torch.stack(parts).sum(dim=0)
        assert float((one.slopes - expected).norm() / expected.norm()) < 0.01


def test_bands_are_of_layers_from_the_last_on_and_others_stand_alone() -> None:
    engine = tezo_ds.initialize(deep(tied=False), {"rank": RANK})
    sizes = [[len(group) for group in band] for band in bands(engine, 3)]
    assert sizes == [[1], [1] * 7, [3] * 7, [1]]  # embedding, layer 0, layers 1 to 3, output layer


def test_what_no_forward_uses_is_refused() -> None:
    model = deep()
    model.unused = nn.Linear(3, 4)
    with pytest.raises(ProbeError, match=r"no loss differs .* unused.weight"):
        measured(model, 1e-3, include=["unused.weight"])


def test_labels_are_needed() -> None:
    engine = tezo_ds.initialize(deep(), {"rank": RANK})
    batch = data(EXAMPLES)
    batch["labels"][:] = -100
    asked = Asked(bands(engine), SEED, [(batch, 0)], EXAMPLES, 1, 1e-3, 8)
    with pytest.raises(ProbeError, match="no example carries a label"):
        measure(engine.sharding, engine.objective, asked)
