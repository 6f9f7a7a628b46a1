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
    rank: int | None,
    seed: int,
    rho: float,
    damping: float,
    scales: tuple[float, ...],
    recall: bool = True,
    words: int = 0,
) -> Iterator[tuple[Weights, Tensor]]:
    """Takes steps from `weights`, which are left as they are, and yields weights and biases after each.

    Args:
        weights: matrices by name, or an adapter's parameters.
        logits: (step, weights) -> (logits of all labelled positions (n, words), their labels (n,)).
        steps: number of steps.
        queries: Q.
        rank, seed: of the factors; None: directions are dense normals, as an adapter's.
        rho: ρ.
        damping: δ.
        scales: scales of the step that are tried, beside 0.
        recall: whether the last step is a direction, of length √D as coefficients.
        words: number of words, if they have biases, 0 at first, that each step moves as well.
    """
    W = {name: w.detach().to("cpu", torch.float64, copy=True) for name, w in weights.items()}
    widths = {name: w.numel() if rank is None else rank for name, w in W.items()}
    bias, last, D = torch.zeros(words).double(), None, sum(widths.values())
    for step in range(steps):
        drawn = [
            {name: tau(name, widths[name], seed, step, q).double() for name in W}
            for q in range(queries)
        ]
        directions = ([last] if recall and last else []) + drawn  # coefficients by name
        spread = _matrix if rank is not None else lambda name, weight, of, seed: of.view_as(weight)
        Z = [{name: spread(name, W[name], of[name], seed) for name in W} for of in directions]

        def at(
            shift: Weights, scale: float, lean: Tensor, here: Weights = W, now: int = step
        ) -> tuple[Tensor, Tensor]:
            z, labels = logits(now, {name: w + scale * shift[name] for name, w in here.items()})
            return (z + lean if words else z), labels

        above, below = [at(z, rho, bias)[0] for z in Z], [at(z, -rho, bias)[0] for z in Z]
        labels = at(Z[0], 0.0, bias)[1]
        p = torch.stack(above + below).mean(dim=0).softmax(dim=1)  # (n, words)
        changes = [(plus - minus) / (2 * rho) for plus, minus in zip(above, below, strict=True)]
        changes += [torch.eye(words).double()[c].expand_as(p) for c in range(words)]
        Q, n = len(changes), len(labels)
        H, g = torch.zeros(Q, Q).double(), torch.zeros(Q).double()
        means = [(p * change).sum(dim=1) for change in changes]  # each (n,)
        for q in range(Q):
            g[q] = (means[q] - changes[q][torch.arange(n), labels]).sum()
            for r in range(Q):
                both = (p * changes[q] * changes[r]).sum(dim=1)
                H[q, r] = (both - means[q] * means[r]).sum()
        H, g = H / n, g / n
        own = H.diagonal()[: len(Z)].mean().repeat(len(Z))
        theirs = H.diagonal()[len(Z) :].mean().repeat(words) if words else torch.empty(0).double()
        inverse = torch.linalg.inv(H + damping * torch.diag(torch.cat([own, theirs])))
        foreseen = float(g @ inverse @ g) / 2
        w = -max(0.0, 1 - float((inverse @ H).trace()) / (2 * n) / foreseen) * (inverse @ g)
        move = {name: sum(w[q] * Z[q][name] for q in range(len(Z))) for name in W}
        losses = [
            float(F.cross_entropy(*at(move, s, bias + s * w[len(Z) :] if words else bias)))
            for s in (0.0, *scales)
        ]
        best = (0.0, *scales)[losses.index(min(losses))]
        W = {name: value + best * move[name] for name, value in W.items()}
        bias = bias + best * w[len(Z) :]
        if best:
            moved = {name: sum(w[q] * of[name] for q, of in enumerate(directions)) for name in W}
            length = torch.cat(list(moved.values())).norm()
            last = {name: value * D**0.5 / length for name, value in moved.items()}
        yield {name: value.clone() for name, value in W.items()}, bias


def _matrix(name: str, weight: Tensor, of: Tensor, seed: int) -> Tensor:
    """Returns U diag(of) Vᵀ, in the weight's shape."""
    U, V = factors(name, matrix_shape(weight.shape), len(of), seed)
    return (U.double() @ torch.diag(of) @ V.double().T).view_as(weight)
