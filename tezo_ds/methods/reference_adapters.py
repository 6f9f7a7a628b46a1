"""TT-ZO as its paper's algorithm box has it (AdaZeta, arXiv 2406.18060), and LoRA trained alike: one process,
direction by direction, core by core, float64.

The definition that adapters of a sharded engine are tested against. It forms every W, so it is for small
models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tezo_ds.directions.draws import tau
from tezo_ds.methods.reference import _RULES, Fields, Record

Parameters = dict[str, Tensor]


def weight_of(cores: Sequence[Tensor], cut: int, size: tuple[int, int]) -> Tensor:
    """Contracts the cores of a tensor train in order.

    Args:
        cores: (a, n, b) each, those of input modes first.
        cut: number of cores of input modes.
        size: inputs and outputs (N, M); rows and columns beyond are left out.

    Returns:
        W (N, M), by which y = x W.
    """
    W = torch.ones(1, 1, dtype=torch.float64)  # (product of modes so far, rank)
    rows = 1
    for k, G in enumerate(cores):
        W = torch.stack([W @ G[:, i] for i in range(G.shape[1])], dim=1)  # (product, n, b)
        W = W.flatten(0, 1)
        if k < cut:
            rows *= G.shape[1]
    return W.view(rows, -1)[: size[0], : size[1]]


def tensor_train_adapter(
    h: Tensor, p: Mapping[str, Tensor], modes: Sequence[int], act: str = "relu"
) -> Tensor:
    """Returns h + up(act(down(h))), of two tensor trains.

    Args:
        h: (…, size).
        p: cores down.0, down.1 …, up.0, up.1 …, and down.bias (bottleneck,), up.bias (size,).
        modes: number of modes of the size, and of the bottleneck.
        act: relu or tanh.
    """
    size, bottleneck = len(p["up.bias"]), len(p["down.bias"])
    cores = {layer: [p[f"{layer}.{k}"] for k in range(sum(modes))] for layer in ("down", "up")}
    down = weight_of(cores["down"], modes[0], (size, bottleneck))
    up = weight_of(cores["up"], modes[1], (bottleneck, size))
    z = h @ down + p["down.bias"]
    return h + (torch.tanh(z) if act == "tanh" else torch.relu(z)) @ up + p["up.bias"]


def lora(x: Tensor, y: Tensor, p: Mapping[str, Tensor], alpha: float) -> Tensor:
    """Returns y + (α / r) x Aᵀ Bᵀ of a layer y of x."""
    return y + alpha / len(p["A"]) * (x @ p["A"].T @ p["B"].T)


def run(
    method: str, parameters: Mapping[str, Tensor], loss: Callable[[int, Parameters], float], steps: int,
    lr: float, rho: float, queries: Callable[[int], int], **fields: Any,
) -> Iterator[Record]:  # fmt: skip
    """Takes `steps` steps from an adapter's parameters; all else of the model is frozen.

    Args:
        method: tezo, tezo-m or tezo-adam-coef, whose rules are plain, momentum and Adam.
        parameters: initial values by name.
        loss: L(step, parameters), called with float64 tensors of the parameters' shapes.
        steps: number of steps.
        lr: η.
        rho: ρ.
        queries: Q of each step; the mean of Q slopes times their directions is the gradient.
        fields: attributes of `reference.Fields`.

    Yields:
        A `Record` for each step; its weights are the parameters.
    """
    options = Fields(**fields)
    P = {name: p.to(torch.float64, copy=True) for name, p in parameters.items()}
    rules = {name: _RULES[method.partition("-")[2]](options) for name in P}
    for step in range(steps):
        kappas, gradient = [], {name: torch.zeros_like(p) for name, p in P.items()}
        for q in range(queries(step)):
            z = {
                name: tau(name, p.numel(), options.seed, step, q).double().view_as(p)
                for name, p in P.items()
            }
            above = loss(step, {name: P[name] + rho * z[name] for name in P})
            below = loss(step, {name: P[name] - rho * z[name] for name in P})
            kappas.append((above - below) / (2 * rho))
            for name in P:
                gradient[name] += kappas[-1] * z[name] / queries(step)
        for name in P:
            P[name] -= lr * rules[name](gradient[name])
        yield Record(step, kappas, {name: p.clone() for name, p in P.items()})
