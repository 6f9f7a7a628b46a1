"""Times terms of low rank within a layer's own product, against the two small products that probes make.

    python benchmarks/one_matrix.py                  a block of SmolLM2-135M, 4 x 32 and 16 x 64 tokens
    python benchmarks/one_matrix.py --hidden 4096    of Llama-2-7B

    apart         y = x Wᵀ, then y += ((x Vᵀ) ∘ c) Uᵀ in place
    V below W     x [W; V]ᵀ gives both x Wᵀ and x Vᵀ
    U beside W    y = [x, (x Vᵀ) ∘ c] [W, U]ᵀ

Layers that read one tensor share x [V₁ V₂ …]ᵀ. Ways take turns, and a ratio to plain ones is of one round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from parts.common.machine import describe
from torch import Tensor

# Features that go in, and out of each layer that reads them: of q, k, v; o; gate, up; down.
BLOCKS = {
    576: ((576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,))),
    4096: ((4096, (4096,) * 3), (4096, (4096,)), (4096, (11008,) * 2), (11008, (4096,))),
}
C = 0.01
Layers = list[tuple[Tensor, list[Tensor], Tensor, list[Tensor]]]


def made(hidden: int, rank: int) -> Layers:
    """Returns, for each tensor that layers read, something as wide as it, W of each (out, in), V of all
    (rank · layers, in), and U of each (out, rank)."""
    found = []
    for ins, outs in BLOCKS[hidden]:
        weights = [torch.randn(out, ins) for out in outs]
        inner = torch.randn(rank * len(outs), ins)
        outer = [torch.randn(out, rank) for out in outs]
        found.append((torch.empty(ins), weights, inner, outer))
    return found


def forwards(layers: Layers, tokens: int, rank: int) -> dict[str, Callable[[], None]]:
    """Returns the ways to make all results of a block, by name."""
    inputs = [torch.randn(tokens, len(of)) for of, *_ in layers]
    below = [torch.cat([weights[0], inner]) for _, weights, inner, _ in layers]
    beside = [
        [torch.cat(both, dim=1) for both in zip(weights, outer, strict=True)]
        for _, weights, _, outer in layers
    ]
    rows = [torch.empty(tokens, len(of) + rank) for of, *_ in layers]

    def plain() -> None:
        for x, (_, weights, *_) in zip(inputs, layers, strict=True):
            for weight in weights:
                x @ weight.t()

    def added(results: list[Tensor], scaled: Tensor, outer: list[Tensor]) -> None:
        for y, part, u in zip(results, scaled.split(rank, dim=1), outer, strict=True):
            y.addmm_(part, u.t())

    def apart() -> None:
        for x, (_, weights, inner, outer) in zip(inputs, layers, strict=True):
            scaled = (x @ inner.t()) * C
            added([x @ weight.t() for weight in weights], scaled, outer)

    def v_below() -> None:
        for x, (_, weights, _, outer), both in zip(inputs, layers, below, strict=True):
            y, scaled = (x @ both.t()).split([len(weights[0]), rank * len(weights)], dim=1)
            added([y, *(x @ weight.t() for weight in weights[1:])], scaled * C, outer)

    def u_beside() -> None:
        for x, (*_, inner, _), both, row in zip(inputs, layers, beside, rows, strict=True):
            scaled = (x @ inner.t()) * C
            row[:, :-rank] = x
            for part, weight in zip(scaled.split(rank, dim=1), both, strict=True):
                row[:, -rank:] = part
                row @ weight.t()

    return {"plain": plain, "apart": apart, "V below W": v_below, "U beside W": u_beside}


def timed(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Returns seconds of each way, a round each in turn."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(1 + rounds):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            if turn:
                found[way].append(time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, choices=BLOCKS, default=576)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[256, 2048], help="of all branches"
    )
    parser.add_argument("--rounds", type=int, default=51)
    args = parser.parse_args()
    print(f"{describe()}; hidden {args.hidden}, rank {args.rank}")
    print("| tokens | plain, ms | apart ÷ plain | V below W ÷ plain | U beside W ÷ plain |")
    print("|---|---|---|---|---|")
    for tokens in args.tokens:
        torch.manual_seed(0)
        seconds = timed(forwards(made(args.hidden, args.rank), tokens, args.rank), args.rounds)
        plain = seconds.pop("plain")
        ratios = []
        for taken in seconds.values():
            each = sorted(a / b for a, b in zip(taken, plain, strict=True))
            low, high = each[len(each) // 10], each[len(each) * 9 // 10]
            ratios.append(f"{statistics.median(each):.3f} ({low:.3f}–{high:.3f})")
        print(f"| {tokens} | {1e3 * statistics.median(plain):.2f} | {' | '.join(ratios)} |")


if __name__ == "__main__":
    main()
