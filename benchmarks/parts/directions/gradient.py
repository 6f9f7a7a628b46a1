"""The estimate of many directions beside the true gradient of the coefficients, had by backpropagation.

A tool of the benchmark alone: training itself never goes backwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tezo_ds
from tezo_ds.directions.draws import factors


@contextmanager
def differentiable(engine: tezo_ds.Engine) -> Iterator[Tensor]:
    """Context manager: plain forwards of the model inside are at its coefficients and differentiable in them.

    Gives:
        the coefficients, float64 (D,), a leaf.

    Raises:
        ValueError: a matrix that trains is not the weight of a Linear.
    """
    modules = dict(engine.sharding.module.named_modules())
    leaf = engine.method.coefficients.clone().requires_grad_(True)
    with ExitStack() as stack:
        for matrix in engine.space.matrices:
            module = modules[matrix.name.removesuffix(".weight")]
            if not isinstance(module, nn.Linear):
                raise ValueError(f"{matrix.name}: belongs to a {type(module).__name__}, no Linear")
            left, right = factors(matrix.name, matrix.shape, matrix.rank, engine.config.seed)
            pair = left.to(matrix.dtype), right.to(matrix.dtype)
            hook = _adding(leaf, engine.space.slices[matrix.name], *pair)
            stack.callback(module.register_forward_hook(hook).remove)
        yield leaf


def _adding(leaf: Tensor, part: slice, left: Tensor, right: Tensor) -> Any:
    """Returns a hook that makes y + ((x V) ∘ c) Uᵀ of y."""

    def hook(_: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
        x = args[0]
        return y + F.linear((x @ right) * leaf[part].to(x.dtype), left)

    return hook


def cosine(one: Tensor, other: Tensor) -> float:
    """Returns the cosine of the angle between two vectors (D,)."""
    return F.cosine_similarity(one.double(), other.double(), dim=0).item()


def expected_cosine(queries: int, coefficients: int) -> float:
    """Returns √(Q / (Q + D + 1)): ‖g‖² is (1 + (D+1)/Q) ‖∇‖² in the mean, of which ‖∇‖² lies along ∇."""
    return math.sqrt(queries / (queries + coefficients + 1))


def cosines(
    kappa: Tensor, taus: Tensor, gradient: Tensor, counts: Sequence[int]
) -> dict[int, list[float]]:
    """Returns the cosine between g = Σκτ/Q and the gradient, for each Q and each group of Q directions.

    Args:
        kappa: slopes, float64 (most,).
        taus: directions, (most, D).
        gradient: the true gradient, (D,).
        counts: values of Q; each at most `most`.
    """
    terms = kappa[:, None] * taus.double()  # (most, D)
    return {
        queries: [
            cosine(terms[start : start + queries].mean(dim=0), gradient)
            for start in range(0, len(terms) - queries + 1, queries)
        ]
        for queries in counts
    }


def agreement(
    engine: tezo_ds.Engine,
    batch: Mapping[str, Tensor],
    loss: Tensor,
    leaf: Tensor,
    counts: Sequence[int],
) -> dict[str, Any]:
    """Compares one step's estimate with the true gradient on one batch, by an engine that does not move.

    Args:
        engine: measures as many directions as the largest count, at a learning rate of 0.
        batch: the batch.
        loss: the batch's loss, made within `differentiable`.
        leaf: the coefficients that `differentiable` gave.
        counts: values of Q.

    Returns:
        cosines by Q with the measured slopes and with the exact ones ⟨∇, τ⟩; the correlation of the
        two; ‖∇‖, and what the step's report takes it for; D.
    """
    (gradient,) = torch.autograd.grad(loss, leaf)
    step = engine.step_index
    report = engine.step(batch)
    taus = engine.space.taus(step, range(len(report.kappa)))
    measured = torch.tensor(report.kappa, dtype=torch.float64)
    exact = taus.double() @ gradient
    return {
        "measured": cosines(measured, taus, gradient, counts),
        "exact": cosines(exact, taus, gradient, counts),
        "slopes_agree": cosine(measured, exact),
        "norm": gradient.norm().item(),
        "reported_norm": report.quality.gradient_norm,
        "coefficients": engine.space.numel,
    }
