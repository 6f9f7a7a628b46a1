"""Hidden states of labelled positions alone, behind the last block.

A model goes on with a tensor of all positions' shape that takes no memory. It is NaN, so that nothing
reads it unnoticed; those who know find the rows that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tezo_ds.trunk.noted import Pairs
from tezo_ds.trunk.outputs import unknown
from tezo_ds.trunk.stand_ins import Act, all_replaced


class Rows:
    """Tensors of all positions' shape, and the rows that they stand for.

    Args:
        behind: makes a context manager, in which modules run on rows of labelled positions.
    """

    def __init__(self, behind: Callable[[], AbstractContextManager[None]]) -> None:
        self.behind, self._rows = behind, Pairs()

    def of(self, x: Tensor) -> Tensor | None:
        """Returns the rows (branches, k, width) that `x` stands for; None: it stands for none."""
        return self._rows.of(x)

    def standing(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Returns what stands for rows (branches, k, width), of a shape but for its width."""
        nan = unknown(rows, (*shape[:-1], rows.shape[-1]))
        self._rows.note(nan, rows)
        return nan

    @contextmanager
    def within(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Context manager: modules that are given what stands for rows are run on these."""
        with all_replaced((module, self._on_rows(module.forward)) for module in modules):
            yield

    def _on_rows(self, forward: Act) -> Act:
        def act(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            rows = self.of(x)
            if rows is None:
                return forward(x, *args, **kwargs)
            with self.behind():
                return self.standing(forward(rows, *args, **kwargs), x.shape)

        return act
