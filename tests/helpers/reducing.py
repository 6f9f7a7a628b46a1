"""Threads that stand for ranks, of functions that add tensors up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Found = TypeVar("Found")
Reduce = Callable[[Tensor], Tensor]


def alone(tensor: Tensor) -> Tensor:
    return tensor


def by_ranks(count: int, work: Callable[[int, Reduce], Found]) -> list[Found]:
    """Runs `work` (rank, all-reduce) on a thread a rank, and returns what each found."""
    barrier, box = threading.Barrier(count), [torch.empty(0)] * count
    found: dict[int, Found] = {}

    def rank(index: int) -> None:
        def reduce(tensor: Tensor) -> Tensor:
            box[index] = tensor.clone()
            barrier.wait()
            total = torch.stack(list(box)).sum(dim=0)
            barrier.wait()
            return total

        try:
            found[index] = work(index, reduce)
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[index] for index in range(count)]
