"""Products of rows that are alike in all branches, made once.

All branches enter the first block that trains with the same hidden states. What a module that does not train
makes of them alone (the block's norm) is the same again, and a weight's product with either differs
between branches only by the term that is added to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tezo_ds.trunk.noted import Pairs
from tezo_ds.trunk.stand_ins import Act, all_replaced


class Alike:
    """Tensors of equal copies, branch-major, each with the one that it has copies of.

    Args:
        copies: hidden states of all branches: (branches * B, T, hidden).
        once: those of one: (B, T, hidden).
    """

    def __init__(self, copies: Tensor, once: Tensor) -> None:
        self._times = len(copies) // len(once)
        self._once = Pairs()
        self._once.note(copies, once)

    def product(self, forward: Act, x: Tensor) -> Tensor:
        """Returns `forward(x)`, which may be written to: of copies made once, and repeated."""
        once = self._once.of(x)
        return forward(x) if once is None else self._repeat(forward(once))

    @contextmanager
    def within(self, block: nn.Module) -> Iterator[None]:
        """Context manager: of copies, modules of the block that nothing is added to make copies."""
        plain = [
            module
            for module in block.modules()
            if not any(True for _ in module.children()) and "forward" not in module.__dict__
        ]
        with all_replaced((module, self._on_one(module.forward)) for module in plain):
            yield

    def _on_one(self, forward: Act) -> Act:
        def act(*args: Any, **kwargs: Any) -> Any:
            once = self._once.of(args[0]) if len(args) == 1 and not kwargs else None
            if once is None:
                return forward(*args, **kwargs)
            y = forward(once)
            if not isinstance(y, Tensor) or len(y) != len(once):
                return forward(*args)
            repeated = self._repeat(y)
            self._once.note(repeated, y)
            return repeated

        return act

    def _repeat(self, y: Tensor) -> Tensor:
        return y.repeat(self._times, *(1 for _ in y.shape[1:]))
