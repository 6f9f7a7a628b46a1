"""Sums over ranks, counted."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]


class Totals:
    """Sums over ranks.

    Attributes:
        messages: all-reduces so far.
        message_bytes: bytes of the largest.

    Args:
        all_reduce: adds a float64 tensor up over the ranks, in place, and returns it.
    """

    def __init__(self, all_reduce: AllReduce) -> None:
        self._reduce = all_reduce
        self.messages = self.message_bytes = 0

    def __call__(self, part: Tensor) -> Tensor:
        """Returns the sum over ranks, on the CPU: the same bits on all."""
        self.messages += 1
        self.message_bytes = max(self.message_bytes, part.nbytes)
        return self._reduce(part).cpu()
