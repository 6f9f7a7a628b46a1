"""Contraction of a tensor train with its input: cores in parallel, or one after the other.

A layer W of N inputs and M outputs is a chain of cores G_k, (a_{k-1}, n_k, a_k), those of the input modes
first, and y = x W with

    W[i_1 … i_p, j_1 … j_q] = G_1[i_1] … G_p[i_p] H_1[j_1] … H_q[j_q].

The chain has the train's rank at the cut between input and output modes, so W = left · right with
left (N, rank) and right (rank, M): y = (x left) right, and W is never formed. Each half is contracted in
pairs of neighbours, pairs of pairs and so on: all cores of a round at once, however long the train.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def halves(cores: Sequence[Tensor], cut: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Contracts the two halves of a train, apart from each other.

    Args:
        cores: (…, a, n, b) each, with the same leading dims.
        cut: number of cores of input modes.
        size: inputs and outputs of the layer; modes' products may be larger.

    Returns:
        left (…, size[0], rank) and right (…, rank, size[1]).
    """
    left, right = _joined(cores[:cut]), _joined(cores[cut:])  # (…, 1, N, rank), (…, rank, M, 1)
    return left[..., 0, : size[0], :], right[..., : size[1], 0]


def _joined(cores: Sequence[Tensor]) -> Tensor:
    """Contracts neighbours of a chain, pair by pair: (…, a, product of n, b)."""
    while len(cores) > 1:
        pairs = [_pair(*cores[k : k + 2]) for k in range(0, len(cores) - 1, 2)]
        cores = [*pairs, *cores[len(pairs) * 2 :]]
    return cores[0]


def _pair(one: Tensor, other: Tensor) -> Tensor:
    """Contracts (…, a, n, b) and (…, b, m, c) into (…, a, n * m, c)."""
    *lead, a, n, b = one.shape
    _, m, c = other.shape[-3:]
    product = one.reshape(*lead, a * n, b) @ other.reshape(*lead, b, m * c)
    return product.view(*lead, a, n * m, c)


def one_by_one(x: Tensor, cores: Sequence[Tensor], cut: int, outputs: int) -> Tensor:
    """Contracts an input with one core after the other, as the textbook does: the slow reference.

    Args:
        x: (branches, rows, inputs).
        cores: (branches, a, n, b) each.
        cut: number of cores of input modes.
        outputs: size of the result; the modes' product may be larger.

    Returns:
        y (branches, rows, outputs).
    """
    branches, rows, inputs = x.shape
    padded = 1
    for core in cores[:cut]:
        padded *= core.shape[2]
    state = F.pad(x, (0, padded - inputs))  # (branches, rows, a * n_1 * n_2 …)
    for core in cores[:cut]:
        _, a, n, b = core.shape
        by_mode = state.view(branches, rows, a * n, -1).transpose(
            2, 3
        )  # (branches, rows, rest, a * n)
        product = by_mode.flatten(1, 2) @ core.reshape(branches, a * n, b)
        state = product.view(branches, rows, -1, b).transpose(2, 3).flatten(2)  # (…, b * rest)
    for core in cores[cut:]:
        _, a, n, b = core.shape
        product = state.view(branches, -1, a) @ core.reshape(branches, a, n * b)
        state = product.view(branches, rows, -1)  # (branches, rows, n_1 * n_2 … * b)
    return state[..., :outputs]
