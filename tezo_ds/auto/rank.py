"""Layer-wise ranks of TeZO (arXiv 2501.19057): how many large singular values a layer's weights have.

No rank of the world holds a whole matrix. So singular values are found by subspace iteration from a random
start, in which every product with a matrix is a sum over the rectangles that ranks hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence

import torch
from torch import Tensor

from tezo_ds.directions.space import Matrix
from tezo_ds.errors import ConfigError, ShardingError
from tezo_ds.patterns import numbered_module
from tezo_ds.rng.philox import derive_key, normals
from tezo_ds.sharding.base import Sharding
from tezo_ds.sharding.view import ShardView

OVERSAMPLING = 16  # columns beyond those asked for, of which the last converge slowly
CAUTION = 10  # times a residual: it understates how far a value is that has hardly been met yet
TOLERANCE = 0.02  # of a squared singular value, so 1 % of the value itself
GROWTH = 1e5  # of one column over another between two QRs; products have 24 bits
DEGREES = 8  # of a filter, at most
ROUNDS = 30  # at most, for values that lie at the threshold itself
PIECE = 1 << 22  # elements of a shard in float32 at a time
TOGETHER = 1 << 22  # numbers in the bases of the matrices that are searched at a time


# Yields what to multiply and whether by Wᵀ, is sent the product, returns the count. All float64.
Search = Generator[tuple[Tensor, bool], Tensor, int]
Asked = dict[Matrix, tuple[Tensor, bool]]


def auto_ranks(
    sharding: Sharding, matrices: Sequence[Matrix], threshold: float, rank_max: int, seed: int
) -> dict[str, int]:
    """Returns the rank r_l of each matrix by the matrix's block l, the same on every rank of the world.

    r_l is the least, over the matrices of the block, of the number of singular values that are at least
    `threshold` times the largest; at most `rank_max`. A block is the outermost numbered module; a matrix
    outside of any is one by itself; one of zeros counts as 1. Exact unless a singular value is within
    1 % of its threshold. Every rank of the world must call it.

    Takes some three float64 tensors of (m + n, rank_max + 16) for a matrix, as many matrices at a time as
    have 4 M numbers in one of each. A pass over those sends half as many, in float32.

    Args:
        sharding: the model; its weights are only read.
        matrices: matrices, of which only name and shape are used.
        threshold: in (0, 1].
        rank_max: 1 or more.
        seed: seed of the random start.

    Raises:
        ConfigError: a weight is not finite. ShardingError: the shards are quantised.
    """
    if sharding.packed.keys() & {matrix.name for matrix in matrices} and not sharding.runs_alone:
        raise ShardingError(
            "rank: auto reads weights, which are packed and sharded here; give rank a number"
        )
    least: dict[str, int] = {}
    for group in _groups(matrices, rank_max + OVERSAMPLING):
        for matrix, count in _counts(sharding, group, threshold, rank_max, seed).items():
            block = _block(matrix)
            least[block] = min(count, least.get(block, count))
    return {matrix.name: least[_block(matrix)] for matrix in matrices}


def _block(matrix: Matrix) -> str:
    return numbered_module(matrix.name) or matrix.name


def _groups(matrices: Sequence[Matrix], columns: int) -> Iterator[list[Matrix]]:
    """Yields matrices in order, as many at a time as there is room for: where there are thousands, a pass
    over the shards of one is mostly overhead."""
    group: list[Matrix] = []
    filled = 0
    for matrix in matrices:
        size = sum(matrix.shape) * min(columns, *matrix.shape)
        if group and filled + size > TOGETHER:
            yield group
            group, filled = [], 0
        group.append(matrix)
        filled += size
    if group:
        yield group


def _counts(
    sharding: Sharding, group: list[Matrix], threshold: float, limit: int, seed: int
) -> dict[Matrix, int]:
    """Searches several matrices at once, so that one pass over their shards serves all."""
    asked: Asked = {}
    for matrix in group:
        n = min(matrix.shape)
        index = torch.arange(n, device=sharding.device)
        key = derive_key(seed, matrix.name, "range")
        asked[matrix] = normals(key, index, min(limit + OVERSAMPLING, n)).double(), False
    scales = _scales(sharding, asked)
    searches: dict[Matrix, Search] = {}
    counts = dict.fromkeys(group, 1)
    for matrix in group:
        start, _ = asked.pop(matrix)
        if scales[matrix] > 0:
            searches[matrix] = search(start, threshold, limit, sharding.maxima)
            asked[matrix] = next(searches[matrix])
    while asked:
        products = _products(sharding, asked)
        for matrix in list(asked):
            try:
                product = products.pop(matrix).double() / scales[matrix]
                asked[matrix] = searches[matrix].send(product)
            except StopIteration as stop:
                counts[matrix] = stop.value
                del asked[matrix]
    return counts


def _scales(sharding: Sharding, starts: Asked) -> dict[Matrix, float]:
    """Returns max |W x| of each matrix, x one random vector; 0 for a matrix of zeros.

    Raises:
        ConfigError: a product is not finite.
    """
    vectors = {matrix: (start[:, :1], False) for matrix, (start, _) in starts.items()}
    products = _products(sharding, vectors)
    scales = {matrix: product.abs().max().item() for matrix, product in products.items()}
    for matrix, scale in scales.items():
        if not math.isfinite(scale):
            raise ConfigError(
                f"{matrix.name} has weights that are not finite, so no rank can be read from it; "
                "check the checkpoint, or add it to exclude"
            )
    return scales


def _products(sharding: Sharding, asked: Asked) -> dict[Matrix, Tensor]:
    """Returns W X or Wᵀ X of each matrix, W turned so that it has no fewer rows than columns; float32.

    An element may be held several times, by several ranks (replicas) or by one (hpZ's secondary copy).
    All of a matrix are then held equally often, so that W comes out scaled, which changes no ratio.
    """
    by_rows = {m: transposed != (m.shape[0] < m.shape[1]) for m, (_, transposed) in asked.items()}
    factors = {m.name: X.float() for m, (X, _) in asked.items()}
    sizes = [(m.shape[1 if by_rows[m] else 0], X.shape[1]) for m, (X, _) in asked.items()]
    flat = torch.zeros(sum(map(math.prod, sizes)), device=sharding.device)
    parts = flat.split([math.prod(size) for size in sizes])
    products = {m: part.view(size) for m, part, size in zip(asked, parts, sizes, strict=True)}
    of_name = {m.name: m for m in asked}

    def add(view: ShardView) -> None:
        matrix, X = of_name[view.name], factors[view.name]
        out = products[matrix]
        for piece in view.pieces(PIECE):
            W = piece.values.to(out.device, out.dtype)
            rows = slice(piece.rows.start, piece.rows.stop)
            columns = slice(piece.columns.start, piece.columns.stop)
            if by_rows[matrix]:
                out[columns].addmm_(W.t(), X[rows])
            else:
                out[rows].addmm_(W, X[columns])

    sharding.each_shard(of_name, add)
    sharding.total(flat)
    return products


def search(
    start: Tensor, threshold: float, limit: int, agree: Callable[[Sequence[int]], list[int]]
) -> Search:
    """Counts the singular values of a W (m, n) that are at least `threshold` times the largest.

    Args:
        start: (n, k), random; k = n makes it exact, else k has to be above `limit`.
        threshold: in (0, 1].
        limit: the largest count of interest.
        agree: gives the maximum of each number over all ranks, which need not have the same processor
            and so not the same last bits.
    """
    basis, (n, k) = start, start.shape
    found = 1
    for _ in range(ROUNDS):
        X = torch.linalg.qr(basis)[0]  # (n, k)
        Y = yield X, False  # (m, k)
        squares, rotation = _eigh(Y.T @ Y)  # (k,), (k, k)
        AX = (yield Y, True) @ rotation  # (n, k), A = WᵀW
        X = X @ rotation
        residuals = (AX - X * squares).norm(dim=0)
        found, settled = judge(squares, residuals, threshold, limit)
        degree = 0 if settled or k == n else _degree(squares)
        found, degree = agree([found, degree])
        if not degree:
            break
        basis = yield from _filtered(X, AX, squares[-1].item(), degree)
    return found


def _filtered(
    X: Tensor, AX: Tensor, bound: float, degree: int
) -> Generator[tuple[Tensor, bool], Tensor, Tensor]:
    """Returns T(2A/bound - 1) X, T the Chebyshev polynomial: the part of X for eigenvalues of A below `bound`
    stays small, and the rest grows as fast as it can at that degree."""
    if degree == 1:
        return AX
    before, now = X, AX * (2 / bound) - X
    for _ in range(degree - 1):
        Anow = yield (yield now, False), True
        before, now = now, Anow * (4 / bound) - now * 2 - before
    return now


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Returns eigenvalues (k,), descending and not negative, and eigenvectors (k, k)."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def judge(squares: Tensor, residuals: Tensor, threshold: float, limit: int) -> tuple[int, bool]:
    """Returns the number of singular values that reach the threshold, and whether it is settled.

    Args:
        squares: squares of the singular values found so far, descending, (k,); none above the true one.
        residuals: ‖A x - square x‖ of each, (k,).
        threshold: share of the largest singular value.
        limit: the largest number of interest.
    """
    doubt = residuals * CAUTION
    doubts = torch.where(doubt <= TOLERANCE * squares, 0, doubt).tolist()
    values, fraction = squares.tolist(), threshold**2
    least = fraction * values[0]
    found = max(1, sum(value >= least for value in values[:limit]))
    # The largest may still grow and so take some away; or the next one, and be added.
    all_stay = found == 1 or values[found - 1] >= least + fraction * doubts[0]
    no_more = found == min(limit, len(values)) or values[found] + doubts[found] < least
    return found, all_stay and no_more


def _degree(squares: Tensor) -> int:
    """Returns the degree of the next filter: the highest that keeps the columns apart."""
    largest, smallest = squares[0].item(), squares[-1].item()
    if smallest <= 0:
        return 1
    rate = math.acosh(max(1.0, 2 * largest / smallest - 1))
    return max(1, min(DEGREES, int(math.acosh(GROWTH) / max(rate, 1e-3))))
