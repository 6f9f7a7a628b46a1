"""L-BFGS, whose every bit is the same on any processor, for problems too large for a Hessian's products."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from torch import Tensor

from tezo_ds.output_layer.newton import dot

STEPS, PAIRS, HALVINGS = 400, 10, 30


def minimise(gradient_at: Callable[[Tensor], Tensor], start: Tensor, tolerance: float) -> Tensor:
    """Returns where a strictly convex function is least.

    Args:
        gradient_at: the gradient, float64 (n,), at x.
        start: where to begin, float64 (n,).
        tolerance: length of the gradient at which to end.
    """
    x, gradient = start, gradient_at(start)
    pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=PAIRS)  # steps, changes of gradient
    for _ in range(STEPS):
        if math.sqrt(dot(gradient, gradient)) <= tolerance:
            break
        step = -_by_inverse(pairs, gradient)
        slope, share = dot(gradient, step), 1.0
        for _ in range(HALVINGS):
            ahead = x + share * step
            there = gradient_at(ahead)
            # Not as steep upwards as it was downwards, so of a convex function lower than x is.
            if dot(there, step) <= -0.9 * slope:
                break
            share /= 2
        else:  # rounding is all that is left
            break
        moved, turned = ahead - x, there - gradient
        x, gradient = ahead, there
        if (product := dot(moved, turned)) > 0:  # but for rounding
            pairs.append((moved, turned, product))
    return x


def _by_inverse(pairs: deque[tuple[Tensor, Tensor, float]], gradient: Tensor) -> Tensor:
    """Returns the inverse Hessian that the last steps show, times a gradient (the two-loop recursion)."""
    shares = []
    for moved, turned, product in reversed(pairs):
        shares.append(dot(moved, gradient) / product)
        gradient = gradient - shares[-1] * turned
    if pairs:
        _, turned, product = pairs[-1]
        gradient = product / dot(turned, turned) * gradient
    for moved, turned, product in pairs:
        gradient = gradient + (shares.pop() - dot(turned, gradient) / product) * moved
    return gradient
