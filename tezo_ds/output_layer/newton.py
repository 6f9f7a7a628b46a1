"""Newton's method by conjugate gradients, whose every bit is the same on any processor.

Ranks minimise one function, whose slopes come out of an all-reduce, each by itself. Libraries sum in an
order that depends on the processor, so sums are made here by halves, out of additions of single numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

STEPS, PRODUCTS, HALVINGS = 60, 500, 30
CLOSE = 0.1  # largest residual of a step's equation, over the gradient; smaller as that gets small

Product = Callable[[Tensor], Tensor]
Slopes = Callable[[Tensor], tuple[Tensor, Product]]


def dot(a: Tensor, b: Tensor) -> float:
    """Returns the inner product of two vectors, with the same bits on any processor."""
    return float(by_halves(a * b))


def by_halves(numbers: Tensor) -> Tensor:
    """Returns sums along the last dim, (…, n) -> (…,), with the same bits on any processor; 0 of nothing."""
    if not numbers.shape[-1]:
        return numbers.sum(dim=-1)
    sums = numbers.numpy(force=True)  # which adds few numbers in less time than torch
    while (count := sums.shape[-1]) > 1:
        half = count // 2
        halves = sums[..., :half] + sums[..., half : 2 * half]
        sums = np.concatenate([halves, sums[..., 2 * half :]], axis=-1) if count % 2 else halves
    return torch.from_numpy(sums[..., 0].copy()).to(numbers.device)


def minimise(slopes: Slopes, start: Tensor, tolerance: float) -> Tensor:
    """Returns where a strictly convex function is least.

    Args:
        slopes: x -> (gradient, function that multiplies by the Hessian there), of float64 (n,).
        start: where to begin, float64 (n,).
        tolerance: length of the gradient at which to end.
    """
    x, (gradient, product) = start, slopes(start)
    for _ in range(STEPS):
        length = math.sqrt(dot(gradient, gradient))
        if length <= tolerance:
            break
        step = _solve(product, gradient, min(CLOSE, math.sqrt(length)) * length)
        slope, share = dot(gradient, step), 1.0
        for _ in range(HALVINGS):
            ahead = x + share * step
            there, product_there = slopes(ahead)
            # Not as steep upwards as it was downwards, so of a convex function lower than x is.
            if dot(there, step) <= -0.9 * slope:
                break
            share /= 2
        else:  # rounding is all that is left
            break
        x, gradient, product = ahead, there, product_there
    return x


def _solve(product: Product, gradient: Tensor, tolerance: float) -> Tensor:
    """Returns the x for which H x = -gradient up to a residual of length `tolerance`."""
    x, residual = torch.zeros_like(gradient), -gradient
    direction, square = residual, dot(residual, residual)
    for _ in range(PRODUCTS):
        image = product(direction)
        curvature = dot(direction, image)
        if curvature <= 0:  # of rounding
            break
        x = x + square / curvature * direction
        residual = residual - square / curvature * image
        before, square = square, dot(residual, residual)
        if math.sqrt(square) <= tolerance:
            break
        direction = residual + square / before * direction
    return x
