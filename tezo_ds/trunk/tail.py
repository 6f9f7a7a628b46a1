"""Labelled positions alone behind the last block's attention.

Its keys and values are needed of all positions. What follows the attention works row by row, and only the
rows of labelled positions are read afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from tezo_ds.trunk.outputs import called_with, hidden_in, hidden_of, with_hidden
from tezo_ds.trunk.stand_ins import Places, replaced, swapped


class _Taken(Exception):
    """End of a block's forward once its attention has returned."""


@contextmanager
def labelled_alone(
    block: nn.Module, name: str, where: Places, positions: Tensor, branches: int,
    behind: Callable[[], AbstractContextManager[None]],
) -> Iterator[None]:  # fmt: skip
    """Context manager: behind its attention the block computes the rows of `positions` alone, and gives zeros
    in the others.

    Runs the block's own code twice: on all rows as far as its attention, then on the chosen rows with the
    attention's result in the attention's place.

    Args:
        block: the model's last block.
        name: the block's attention, among its children.
        where: where the attention is held.
        positions: int64 (k,), places in one copy's flattened (B * T).
        branches: copies of the batch, branch-major.
        behind: makes a context manager, in which the block runs on the chosen rows.
    """
    attention, forward = block.get_submodule(name), block.forward
    # A rank without labels takes part all the same: some layers object to no rows at all.
    rows = positions if len(positions) else positions.new_zeros(1)

    def chosen(x: Tensor) -> Tensor:  # (branches * B, T, width) -> (branches, k, width)
        return x.reshape(branches, -1, x.shape[-1])[:, rows]

    def call(*args: Any, **kwargs: Any) -> Any:
        taken: list[Any] = []

        def take(*inner: Any, **named: Any) -> None:
            taken.append(attention(*inner, **named))
            raise _Taken

        with swapped(where, [(attention, take)]):
            try:
                return forward(*args, **kwargs)  # a block that has no use for its attention
            except _Taken:
                pass
        few = with_hidden(taken[0], chosen(hidden_of(taken[0])))
        hidden = hidden_in(args, kwargs)
        args, kwargs = called_with(args, kwargs, chosen(hidden))
        with swapped(where, [(attention, lambda *_, **__: few)]), behind():
            output = forward(*args, **kwargs)
        result = hidden_of(output)  # (branches, k, width)
        whole = result.new_zeros(*hidden.shape[:-1], result.shape[-1])
        whole.view(branches, -1, result.shape[-1])[:, rows] = result
        return with_hidden(output, whole)

    with replaced(block, call):
        yield
