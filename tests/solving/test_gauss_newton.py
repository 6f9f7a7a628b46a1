"""Gauss-Newton in the span of measured directions: the matrix, the step, what is left of noise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tezo_ds.directions.branches import Ask
from tezo_ds.solving.gauss_newton import solve
from tezo_ds.solving.responses import Responses


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def responses(
    z: Tensor, changes: Tensor, labels: Tensor, central: bool, dtype: torch.dtype = torch.float64
) -> Responses:
    """Returns the sums over positions whose logits are linear, as the branches of a step would show them."""
    matrix = Ask.of(0, range(len(changes)), 0.25, central).matrix()
    found = Responses(matrix)
    logits = (z + torch.einsum("bq,qkv->bkv", matrix, changes)).to(dtype)
    for part in (slice(0, 3), slice(3, 3), slice(3, None)):
        found.add(logits[:, part], labels[part])
    return found


@pytest.mark.parametrize("central", [True, False])
def test_gradient_and_matrix_are_those_of_the_loss(central: bool) -> None:
    z, changes, labels = drawn(7, 5), drawn(3, 7, 5, seed=1), torch.tensor([0, 1, 2, 3, 4, 0, 1])

    def loss(w: Tensor) -> Tensor:
        return F.cross_entropy(z + torch.einsum("q,qkv->kv", w, changes), labels, reduction="sum")

    found, at = responses(z, changes, labels, central), torch.zeros(3, dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(loss, at)
    # z is linear in w, so that Gauss-Newton's matrix is the whole Hessian.
    hessian = torch.autograd.functional.hessian(loss, at)
    torch.testing.assert_close(found.slope, gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.gram, hessian, rtol=1e-9, atol=1e-9)
    single = responses(z, changes, labels, central, torch.float32)
    torch.testing.assert_close(single.gram, hessian, rtol=1e-4, atol=1e-4)


def test_biases_are_directions_that_need_no_branch() -> None:
    z, changes, labels = drawn(7, 5), drawn(2, 7, 5, seed=1), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    matrix = Ask.of(0, range(2), 0.25).matrix()
    found = Responses(matrix, 5)
    found.add(z + torch.einsum("bq,qkv->bkv", matrix, changes), labels)
    ones = torch.eye(5, dtype=torch.float64)[:, None].expand(-1, 7, -1)
    longer = responses(z, torch.cat([changes, ones]), labels, True)
    torch.testing.assert_close(found.gram, longer.gram, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.slope, longer.slope, rtol=1e-9, atol=1e-9)
    # Each kind is damped by its own diagonal, whatever unit directions have.
    unit = torch.tensor([1e3, 1e3, 1, 1, 1, 1, 1], dtype=torch.float64)
    one = solve(found.gram, found.slope, 70, 0.3, 5)
    other = solve(found.gram * unit * unit[:, None], found.slope * unit, 70, 0.3, 5)
    torch.testing.assert_close(other.weights * unit, one.weights)


def test_the_step_is_newtons_less_what_noise_gains() -> None:
    z, changes, labels = drawn(400, 4), drawn(2, 400, 4, seed=1), torch.arange(400) % 4
    found = responses(z, changes, labels, True)
    solved = solve(found.gram, found.slope, 400, 0.0)
    newton = -torch.linalg.solve(found.gram, found.slope)
    assert 0 < solved.shrink < 1
    torch.testing.assert_close(solved.weights, solved.shrink * newton)
    assert solved.shrink == pytest.approx(1 - (2 / 800) / solved.foreseen)
    damped = solve(found.gram, found.slope, 400, 0.3)
    assert 0 < damped.weights.norm() < solved.weights.norm()


def test_labels_that_are_noise_move_little() -> None:
    """Directions without a true gain: unshrunk, a step loses on others what it gains on these."""
    moved = []
    for seed in range(30):
        z, changes = torch.zeros(60, 3, dtype=torch.float64), drawn(8, 60, 3, seed=seed)
        labels = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(seed + 99))
        found = responses(z, changes, labels, True)
        newton = torch.linalg.solve(found.gram, found.slope)
        moved.append(float(solve(found.gram, found.slope, 60, 0.0).weights.norm() / newton.norm()))
    assert sum(moved) / len(moved) < 0.25


def test_a_direction_that_failed_is_left_out() -> None:
    z, changes, labels = drawn(50, 4), drawn(3, 50, 4, seed=1), torch.arange(50) % 4
    found = responses(z, changes, labels, True)
    two = responses(z, changes[[0, 2]], labels, True)
    gram, slope = found.gram.clone(), found.slope.clone()
    gram[1], gram[:, 1], slope[1] = torch.nan, torch.nan, torch.nan
    solved, expected = solve(gram, slope, 50, 0.1), solve(two.gram, two.slope, 50, 0.1)
    torch.testing.assert_close(solved.weights[[0, 2]], expected.weights)
    assert solved.weights[1] == 0
    nothing = solve(gram * torch.nan, slope * torch.nan, 50, 0.1)
    assert nothing.weights.eq(0).all() and nothing.shrink == 0
