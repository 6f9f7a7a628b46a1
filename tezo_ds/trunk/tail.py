"""Labelled positions alone behind the last block's attention.

Its keys and values are needed of all positions. What follows them works row by row, the attention's own
last map, where it has one, and the rest of the block, and only the rows of labelled positions are read
afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from tezo_ds.trunk.found import Attention
from tezo_ds.trunk.noted import Noted
from tezo_ds.trunk.outputs import called_with, hidden_in, hidden_of, with_hidden
from tezo_ds.trunk.stand_ins import Places, replaced, swapped


class _Taken(Exception):
    """End of a block's forward once its attention has returned."""


@contextmanager
def labelled_alone(
    block: nn.Module, attention: Attention, where: Places, positions: Tensor, branches: int,
    behind: Callable[[], AbstractContextManager[None]],
) -> Iterator[None]:  # fmt: skip
    """Context manager: behind its attention the block computes the rows of `positions` alone, and gives zeros
    in the others.

    Runs the block's own code twice: on all rows as far as its attention, then on the chosen rows with the
    attention's result in the attention's place.

    Args:
        block: the model's last block.
        attention: its attention; a last map of it runs on the chosen rows, too.
        where: where these are held.
        positions: int64 (k,), places in one copy's flattened (B * T).
        branches: copies of the batch, branch-major.
        behind: makes a context manager, in which modules run on the chosen rows.
    """
    forward, mixes = block.forward, attention.module
    # A rank without labels takes part all the same: some layers object to no rows at all.
    rows = positions if len(positions) else positions.new_zeros(1)

    def chosen(x: Tensor) -> Tensor:  # (branches * B, T, width) -> (branches, k, width)
        return x.reshape(branches, -1, x.shape[-1])[:, rows]

    def call(*args: Any, **kwargs: Any) -> Any:
        taken: list[tuple[Any, Tensor]] = []

        def take(*inner: Any, **named: Any) -> None:
            taken.append(_mixed(attention, where, inner, named))
            raise _Taken

        with swapped(where, [(mixes, take)]):
            try:
                return forward(*args, **kwargs)  # a block that has no use for its attention
            except _Taken:
                pass
        output, mixed = taken[0][0], chosen(taken[0][1])

        def give(*_: Any, **__: Any) -> Any:
            few = mixed if attention.last is None else attention.last(mixed)
            return with_hidden(output, few)

        hidden = hidden_in(args, kwargs)
        args, kwargs = called_with(args, kwargs, chosen(hidden))
        with swapped(where, [(mixes, give)]), behind():
            output = forward(*args, **kwargs)
        result = hidden_of(output)  # (branches, k, width)
        whole = result.new_zeros(*hidden.shape[:-1], result.shape[-1])
        whole.view(branches, -1, result.shape[-1])[:, rows] = result
        return with_hidden(output, whole)

    with replaced(block, call):
        yield


def _mixed(
    attention: Attention, where: Places, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Tensor]:
    """Returns what an attention gives, and of it, or of what its last map is given, the rows of all
    positions: (branches * B, T, width). That map does not run."""
    if attention.last is None:
        output = attention.module(*args, **kwargs)
        return output, hidden_of(output)
    given: list[tuple[Tensor, Noted]] = []

    def note(x: Tensor) -> Tensor:
        nan = x.new_full((1,), math.nan).expand(*x.shape[:-1], attention.width)
        given.append((x, Noted(nan)))
        return nan

    with swapped(where, [(attention.last, note)]):
        output = attention.module(*args, **kwargs)
    if len(given) != 1 or not given[0][1].is_(hidden_of(output)):
        raise RuntimeError(f"{type(attention.module).__name__} does more than its last map")
    return output, given[0][0]
