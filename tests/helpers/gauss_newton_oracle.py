"""Gauss-Newton in the span of TeZO's directions as the formulas have it: dense, in float64, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from tezo_ds.directions.draws import factors, tau
from tezo_ds.sharding.view import matrix_shape

Weights = dict[str, Tensor]


def run(
    weights: Mapping[str, Tensor],
    logits: Callable[[int, Weights], tuple[Tensor, Tensor]],
    steps: int,
    queries: int,
    rank: int,
    seed: int,
    rho: float,
    damping: float,
    scales: tuple[float, ...],
) -> Iterator[Weights]:
    """Takes steps from `weights`, which are left as they are, and yields the weights after each.

    Args:
        weights: matrices by name.
        logits: (step, weights) -> (logits of all labelled positions (n, words), their labels (n,)).
        steps: number of steps.
        queries: Q.
        rank, seed: of the factors.
        rho: ρ.
        damping: δ.
        scales: scales of the step that are tried, beside 0.
    """
    W = {name: w.detach().to("cpu", torch.float64, copy=True) for name, w in weights.items()}
    for step in range(steps):
        Z = [
            {name: _direction(name, w, rank, seed, step, q) for name, w in W.items()}
            for q in range(queries)
        ]

        def at(
            shift: Weights, scale: float, here: Weights = W, now: int = step
        ) -> tuple[Tensor, Tensor]:
            return logits(now, {name: w + scale * shift[name] for name, w in here.items()})

        above, below = [at(z, rho)[0] for z in Z], [at(z, -rho)[0] for z in Z]
        labels = at(Z[0], 0.0)[1]
        p = torch.stack(above + below).mean(dim=0).softmax(dim=1)  # (n, words)
        changes = [(plus - minus) / (2 * rho) for plus, minus in zip(above, below, strict=True)]
        n, H, g = len(labels), torch.zeros(queries, queries).double(), torch.zeros(queries).double()
        for q in range(queries):
            for i in range(n):
                g[q] += (p[i] * changes[q][i]).sum() - changes[q][i, labels[i]]
                for r in range(queries):
                    both = (p[i] * changes[q][i] * changes[r][i]).sum()
                    H[q, r] += both - (p[i] * changes[q][i]).sum() * (p[i] * changes[r][i]).sum()
        H, g = H / n, g / n
        inverse = torch.linalg.inv(H + damping * H.diagonal().mean() * torch.eye(queries).double())
        foreseen = float(g @ inverse @ g) / 2
        w = -max(0.0, 1 - float((inverse @ H).trace()) / (2 * n) / foreseen) * (inverse @ g)
        step_of = {name: sum(w[q] * Z[q][name] for q in range(queries)) for name in W}
        losses = [float(F.cross_entropy(*at(step_of, s))) for s in (0.0, *scales)]
        best = (0.0, *scales)[losses.index(min(losses))]
        W = {name: value + best * step_of[name] for name, value in W.items()}
        yield {name: value.clone() for name, value in W.items()}


def _direction(name: str, weight: Tensor, rank: int, seed: int, step: int, q: int) -> Tensor:
    """Returns Z = U diag(τ) Vᵀ of one direction, in the weight's shape."""
    U, V = factors(name, matrix_shape(weight.shape), rank, seed)
    of = tau(name, rank, seed, step, q).double()
    return (U.double() @ torch.diag(of) @ V.double().T).view_as(weight)
