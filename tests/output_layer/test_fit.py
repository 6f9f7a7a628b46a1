"""The fit of the output layer against Newton's method on all data at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from reducing import Reduce, alone, by_ranks
from torch import Tensor

from tezo_ds.errors import ProbeError
from tezo_ds.output_layer.choosing import FOLD
from tezo_ds.output_layer.columns import TRIFLE
from tezo_ds.output_layer.fit import Fitted, fit
from tezo_ds.output_layer.newton import Product, dot, minimise
from tezo_ds.output_layer.problem import GRID, States


def made(n: int = 90, words: int = 3, width: int = 5, seed: int = 0) -> States:
    """Makes states with a large mean, dims of different size, and words that follow from them in part."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=generator) * torch.logspace(-1, 1, width) + 7
    logits = torch.randn(n, words, generator=generator) * 2
    direction = torch.randn(words, width, generator=generator)
    noise = torch.randn(n, words, generator=generator)
    truth = ((hidden - 7) @ direction.t() + noise).argmax(dim=1)
    return States(hidden, logits, truth, torch.arange(n) % FOLD == FOLD - 1)


def newton(states: States, strength: float, bias_alone: bool) -> tuple[Tensor, Tensor]:
    """Solves the problem as it is written, uncentred, with the whole Hessian."""
    hidden, logits = states.hidden.double(), states.logits.double()
    mean = hidden.mean(dim=0)
    words, width = logits.shape[1], hidden.shape[1]

    def loss(x: Tensor) -> Tensor:
        weight, bias = x[: words * width].view(words, width), x[words * width :]
        if bias_alone:
            weight = weight * 0
        ridge = strength * weight.square().sum()
        trifle = TRIFLE * (bias + weight @ mean).square().sum()
        return F.cross_entropy(logits + hidden @ weight.t() + bias, states.truth) + ridge + trifle

    x = torch.zeros(words * (width + 1), dtype=torch.float64)
    for _ in range(60):
        gradient = torch.func.grad(loss)(x)
        hessian = torch.func.hessian(loss)(x)
        step = torch.linalg.lstsq(hessian, gradient[:, None], driver="gelsd").solution[:, 0]
        length = 1.0
        while loss(x - length * step) > loss(x) and length > 1e-9:
            length /= 2
        x = x - length * step
        if float(step.abs().max()) < 1e-12:
            break
    return x[: words * width].view(words, width), x[words * width :]


def in_parts(states: States, parts: int) -> list[Fitted]:
    """Fits on threads that stand for ranks, and returns what each found."""

    def rank(index: int, reduce: Reduce) -> Fitted:
        rows = slice(len(states.truth) * index // parts, len(states.truth) * (index + 1) // parts)
        own = (states.hidden[rows], states.logits[rows], states.truth[rows], states.held[rows])
        return fit(States(*own), False, reduce)

    return by_ranks(parts, rank)


@pytest.mark.parametrize("bias_alone", [False, True])
@pytest.mark.parametrize(("words", "width"), [(3, 5), (2, 1), (6, 4)])
def test_the_fit_is_newtons(words: int, width: int, bias_alone: bool) -> None:
    states = made(words=words, width=width)
    found = fit(states, bias_alone, alone)
    assert (found.strength is None) == bias_alone
    weight, bias = newton(states, found.strength or 0.0, bias_alone)
    if bias_alone:
        assert not found.weight.any()
    else:
        assert found.weight.abs().max() > 0.01
        torch.testing.assert_close(found.weight, weight.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.bias, bias.float(), rtol=1e-4, atol=1e-4)
    assert found.examples == 90


def test_what_is_held_out_is_judged_by_a_fit_to_the_others() -> None:
    states = made()
    found = fit(states, False, alone)
    held, kept = states.held, ~states.held
    rest = States(states.hidden[kept], states.logits[kept], states.truth[kept], held[kept])
    tried = {}
    scale = float((states.hidden.double() - states.hidden.double().mean(0)).square().sum()) / 90
    for strength in (g * scale for g in GRID):
        weight, bias = newton(rest, strength, False)
        logits = states.logits[held] + states.hidden[held].double() @ weight.t() + bias
        right = (logits.argmax(1) == states.truth[held]).double().mean()
        tried[strength] = (float(F.cross_entropy(logits, states.truth[held])), float(right))
    best = min(tried, key=lambda strength: tried[strength][0])
    assert found.strength == pytest.approx(best, rel=1e-9)
    assert (found.after.loss, found.after.accuracy) == pytest.approx(tried[best], rel=1e-4)
    before = float(F.cross_entropy(states.logits[held], states.truth[held]))
    assert found.before.loss == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("parts", [2, 3])
def test_ranks_find_the_same_bits_and_up_to_rounding_what_one_finds(parts: int) -> None:
    states = made(n=91)
    one, several = fit(states, False, alone), in_parts(states, parts)
    assert len(several) == parts
    for found in several:
        assert torch.equal(found.weight, several[0].weight)
        assert torch.equal(found.bias, several[0].bias)
        torch.testing.assert_close(found.weight, one.weight, rtol=1e-5, atol=1e-7)
        assert found.strength == pytest.approx(one.strength)
        assert found.message_bytes == 8 * 3 * (5 + 1)


def test_states_that_are_all_alike_tell_how_often_a_word_is_right() -> None:
    states = made()
    alike = replace(states, hidden=torch.full_like(states.hidden, 7.5))
    found, biases = fit(alike, False, alone), fit(alike, True, alone)
    assert not found.weight.any() and found.bias.any()
    torch.testing.assert_close(found.bias, biases.bias)


def test_a_word_without_examples_has_a_finite_bias() -> None:
    states = made(words=3)
    truth = states.truth.clamp(max=1)
    found = fit(States(states.hidden, states.logits, truth, states.held), True, alone)
    assert found.bias.isfinite().all() and found.bias[2] < found.bias[:2].min() - 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["hidden", "logits"])
def test_what_is_not_finite_is_refused(which: str, value: float) -> None:
    states = made()
    getattr(states, which)[5, 1] = value
    with pytest.raises(ProbeError, match=r"output_layer: a hidden state or logit .* not finite"):
        fit(states, False, alone)


def test_sums_are_by_halves_and_a_quadratic_is_solved() -> None:
    a, b = torch.rand(1001, dtype=torch.float64), torch.rand(1001, dtype=torch.float64)
    assert dot(a, b) == pytest.approx(float((a * b).sum()), rel=1e-14)
    products = (a * b).tolist()
    while len(products) > 1:
        half = len(products) // 2
        pairs = zip(products[:half], products[half : 2 * half], strict=True)
        products = [x + y for x, y in pairs] + products[2 * half :]
    assert dot(a, b) == products[0]
    curves = torch.logspace(-2, 3, 30, dtype=torch.float64)
    goal = torch.linspace(-1, 1, 30, dtype=torch.float64)

    def bowl(x: Tensor) -> tuple[Tensor, Product]:
        return curves * (x - goal), lambda v: curves * v

    assert dot(curves * goal, goal) > 1000
    found = minimise(bowl, torch.zeros(30, dtype=torch.float64), 1e-9)
    torch.testing.assert_close(found, goal, rtol=0, atol=1e-6)
