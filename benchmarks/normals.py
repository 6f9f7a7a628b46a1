"""Millions of random numbers a second: eager, compiled, and torch.randn for comparison."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from parts.common.machine import describe
from rich.console import Console
from rich.table import Table

from tezo_ds.rng import philox

KEY = philox.derive_key(0, "benchmark", "Z")


def rate(numbers: int, draw: Callable[[], object], rounds: int) -> float:
    """Returns millions of numbers a second, as the median over rounds."""
    draw()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        draw()
        seconds.append(time.perf_counter() - start)
    return numbers / statistics.median(seconds) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shapes", nargs="+", default=["2048x2048", "262144x16"], help="rows x columns"
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    start = time.perf_counter()
    from tezo_ds.rng import compiled

    print(f"{describe()}; compiled in {time.perf_counter() - start:.1f} s")
    table = Table(
        "threads", "shape", "normals eager", "compiled", "uniforms", "torch.randn", title="M/s"
    )
    for threads in sorted(set(args.threads)):
        torch.set_num_threads(threads)
        for shape in args.shapes:
            table.add_row(str(threads), shape, *measure(shape, args.rounds, compiled.fill_))
    Console().print(table)


def measure(shape: str, rounds: int, compiled: Callable[..., None]) -> list[str]:
    """Measures one row of the table; widths are multiples of eight."""
    rows, columns = map(int, shape.split("x"))
    index = torch.arange(rows)
    normals, uniforms = torch.empty(rows, columns // 4, 4), torch.empty(rows, columns // 8, 8)
    draws: list[Callable[[], object]] = [
        lambda: philox.fill_(normals, index, KEY, 0, 0),
        lambda: compiled(normals, index, KEY, 0, 0),
        lambda: compiled(uniforms, index, KEY, 0, 0),
        lambda: normals.normal_(),
    ]
    return [f"{rate(rows * columns, draw, rounds):.0f}" for draw in draws]


if __name__ == "__main__":
    main()
