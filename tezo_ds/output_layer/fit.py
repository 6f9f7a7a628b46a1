"""Fits of label words' rows and biases, and of inner layers' terms, to states over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tezo_ds.output_layer.choosing import Quality, choose
from tezo_ds.output_layer.problem import Problem, States, problem_of
from tezo_ds.output_layer.totals import AllReduce

# Length of the gradient at which to end, in variables that curve alike: to choose λ, and then.
ROUGHLY, EXACTLY = 1e-4, 1e-9
# The same of a problem with value projections, which has many more variables: of A the half is taken, and ΔW
# and b are fitted once more, so digits of it are worth nothing, and would take most of the time.
LOOSELY = 3e-3, 1e-3


@dataclass(frozen=True)
class Fitted:
    """A fitted term, the same bits on every rank.

    Attributes:
        weight: ΔW, float32 (C, d); zero where the bias alone was fitted. With a basis B, (C, r).
        bias: b, float32 (C,).
        strength: λ; None where the bias alone was fitted.
        examples: states over all ranks.
        before, after: of the examples that are held out, without the term and with one fitted to the others.
        messages: all-reduces.
        message_bytes: bytes of the largest.
        basis: A, float32 (r, d), for which ΔW is B A; None: ΔW is the weight.
        inner: U and A of each inner layer, float32 (m, K) and (K, width).
        multiplier: what the model multiplies its output layer's result by; the term is on the logits behind.
    """

    weight: Tensor
    bias: Tensor
    strength: float | None
    examples: int
    before: Quality
    after: Quality
    messages: int
    message_bytes: int
    basis: Tensor | None = None
    inner: Sequence[tuple[Tensor, Tensor]] = ()
    multiplier: float = 1.0


@dataclass(frozen=True)
class Choice:
    """A problem whose λ was chosen by the examples that are held out.

    Attributes:
        strength: λ.
        before, after: as of `Fitted`.
    """

    strength: float
    before: Quality
    after: Quality
    _problem: Problem
    _x: Tensor

    @property
    def inner(self) -> Sequence[tuple[Tensor, Tensor]]:
        """U and A of each inner layer, as of `Fitted`, of those that the examples held out had no part in."""
        return self._problem.solution(self._x)[1]

    def measured(self, states: States, all_reduce: AllReduce) -> Choice:
        """Returns what ΔW and b are worth that are fitted anew, with the same λ and to the same examples, to
        states of forwards that have the terms of `inner`. Every rank must call it."""
        problem = problem_of(states, False, all_reduce)
        x = problem.least(problem.zero(), self.strength, False, ROUGHLY)
        return replace(self, after=problem.quality(x), _problem=problem, _x=x)

    def fitted(self) -> Fitted:
        """Fits the term to all examples; every rank must call it."""
        problem = self._problem
        (weight, bias), inner = problem.solution(
            problem.least(self._x, self.strength, None, _tolerances(problem)[1])
        )
        return Fitted(
            weight, bias, None if problem.alone else self.strength, problem.counts[0], self.before,
            self.after, problem.totals.messages, problem.totals.message_bytes, inner=inner,
            multiplier=problem.multiplier,
        )  # fmt: skip


def gain(less: Choice, more: Choice) -> tuple[float, float]:
    """Returns by how much a second fit to the same examples lowers the mean loss of those that are held out,
    and the standard error of that. Every rank must call it."""
    problem = more._problem
    differences = less._problem.losses(less._x) - problem.losses(more._x)
    sums = torch.stack([differences.sum(), differences.square().sum()])
    count = max(1, problem.counts[2])
    mean, square = (problem.totals(sums) / count).tolist()
    return mean, math.sqrt(max(0.0, square - mean**2) / max(1, count - 1))


def choice(states: States, bias_alone: bool, all_reduce: AllReduce) -> Choice:
    """Chooses λ. Every rank calls this with the states of its own examples.

    Args:
        states: this rank's.
        bias_alone: whether ΔW stays zero.
        all_reduce: adds a float64 tensor up over the ranks, in place, and returns it.

    Raises:
        ProbeError: a hidden state, a logit or what is known of an inner layer is not finite.
    """
    problem = problem_of(states, bias_alone, all_reduce)
    x = problem.zero()
    before = problem.quality(x)
    strength, after, x = choose(problem, x, problem.strengths, _tolerances(problem)[0])
    return Choice(strength, before, after, problem, x)


def _tolerances(problem: Problem) -> tuple[float, float]:
    return LOOSELY if problem.large else (ROUGHLY, EXACTLY)


def fit(states: States, bias_alone: bool, all_reduce: AllReduce) -> Fitted:
    """Fits the term, with a λ chosen as by `choice`, whose arguments and errors it has."""
    return choice(states, bias_alone, all_reduce).fitted()


def again(states: States, fitted: Fitted, all_reduce: AllReduce) -> Fitted:
    """Returns a fit with ΔW and b anew, to other states, with the same λ. Every rank must call it."""
    assert fitted.strength is not None
    problem = problem_of(states, False, all_reduce)
    x = problem.least(problem.zero(), fitted.strength, None, EXACTLY)
    weight, bias = problem.solution(x)[0]
    messages = fitted.messages + problem.totals.messages
    return replace(fitted, weight=weight, bias=bias, messages=messages)
