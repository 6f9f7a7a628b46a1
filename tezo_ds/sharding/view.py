"""The one thing that the mathematics sees of a distributed weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ShardView:
    """A contiguous range of a matrix's row-major elements, held by this rank.

    Attributes:
        name: the model's own parameter name.
        shape: global (m, n).
        start: first element held, in the global row-major order.
        local: the elements [start, stop) themselves, 1-D; writing to it writes the weight.
    """

    name: str
    shape: tuple[int, int]
    start: int
    local: Tensor

    @property
    def numel(self) -> int:
        """Elements held; 0 on a rank past the end."""
        return self.local.numel()

    @property
    def stop(self) -> int:
        """One past the last element held."""
        return self.start + self.numel

    @property
    def key(self) -> tuple[str, int, int]:
        """Identifies the range; under hpZ a rank holds two ranges of a parameter."""
        return self.name, self.start, self.numel

    @property
    def rows(self) -> range:
        """The rows of the matrix (hence of U) that the range touches, ragged ends included."""
        n = self.shape[1]
        return range(self.start // n, -(-self.stop // n)) if self.numel else range(0)
