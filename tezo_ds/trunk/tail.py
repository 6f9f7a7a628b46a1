"""Labelled positions alone behind the last block's attention.

Its keys and values are needed of all positions. What follows them works row by row, the attention's own
last map, where it has one, and the rest of the block, and only the rows of labelled positions are read
afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from tezo_ds.trunk.found import Attention
from tezo_ds.trunk.noted import Noted
from tezo_ds.trunk.outputs import called_with, hidden_in, hidden_of, unknown, with_hidden
from tezo_ds.trunk.rows import Rows
from tezo_ds.trunk.stand_ins import Act, Places, replaced, swapped


class _Taken(Exception):
    """End of a block's forward once its attention has returned."""


class Mixed(NamedTuple):
    """A block's forward as far as its attention.

    Attributes:
        entered: hidden states that entered the block, (B, T, hidden).
        given: what the attention's last map is given; without one, what the attention gives: (B, T, width).
        output: what the attention gives.
    """

    entered: Tensor
    given: Tensor
    output: Any

    def of_rows(self, positions: Tensor, branches: int) -> Mixed:
        """Returns the rows of labelled positions, (branches, k, …) of (branches * B, T, …)."""
        # A rank without labels takes part all the same: some layers object to no rows at all.
        rows = positions if len(positions) else positions.new_zeros(1)
        entered, given = (
            x.reshape(branches, -1, x.shape[-1])[:, rows] for x in (self.entered, self.given)
        )
        return Mixed(entered, given, self.output)

    def repeated(self, branches: int) -> Mixed:
        """Returns rows (1, k, …) for as many branches, which are all alike."""
        entered, given = (x.repeat(branches, 1, 1) for x in (self.entered, self.given))
        return Mixed(entered, given, self.output)


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
    forward = block.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        mixed = mixed_by(forward, attention, where, args, kwargs)
        with behind():
            few = mixed.of_rows(positions, branches)
            output = _behind(forward, attention, where, args, kwargs, few)
        result = hidden_of(output)  # (branches, k, width)
        whole = result.new_zeros(*mixed.entered.shape[:-1], result.shape[-1])
        rows = whole.view(branches, -1, result.shape[-1])
        rows[:, positions] = result[:, : len(positions)]
        return with_hidden(output, whole)

    with replaced(block, call):
        yield


@contextmanager
def rows_alone(
    block: nn.Module, attention: Attention, where: Places, mixed: Mixed, standing: Rows
) -> Iterator[None]:
    """Context manager: the block begins behind its attention, with rows of labelled positions, and gives what
    stands for them.

    Args:
        block: the model's last block.
        attention: its attention.
        where: where these are held.
        mixed: the rows of all branches, (branches, k, …).
        standing: notes what stands for the rows that the block gives.
    """
    forward = block.forward

    def call(*args: Any, **kwargs: Any) -> Any:
        with standing.behind():
            output = _behind(forward, attention, where, args, kwargs, mixed)
        shape = hidden_in(args, kwargs).shape
        return with_hidden(output, standing.standing(hidden_of(output), shape))

    with replaced(block, call):
        yield


def mixed_by(
    forward: Act, attention: Attention, where: Places, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Mixed:
    """Runs a block's forward as far as its attention, without a last map of that.

    Raises:
        RuntimeError: the attention was not called, or does more than its last map.
    """
    taken: list[tuple[Any, Tensor]] = []

    def take(*inner: Any, **named: Any) -> None:
        taken.append(_without_last(attention, where, inner, named))
        raise _Taken

    with swapped(where, [(attention.module, take)]):
        try:
            forward(*args, **kwargs)
        except _Taken:
            ((output, given),) = taken
            return Mixed(hidden_in(args, kwargs), given, output)
    raise RuntimeError(f"{type(attention.module).__name__} was not called")


def _without_last(
    attention: Attention, where: Places, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Tensor]:
    """Returns what an attention gives, and what its last map is given, which does not run."""
    if attention.last is None:
        output = attention.module(*args, **kwargs)
        return output, hidden_of(output)
    given: list[tuple[Tensor, Noted]] = []

    def note(x: Tensor) -> Tensor:
        nan = unknown(x, (*x.shape[:-1], attention.width))
        given.append((x, Noted(nan)))
        return nan

    with swapped(where, [(attention.last, note)]):
        output = attention.module(*args, **kwargs)
    if len(given) != 1 or not given[0][1].is_(hidden_of(output)):
        raise RuntimeError(f"{type(attention.module).__name__} does more than its last map")
    return output, given[0][0]


def _behind(
    forward: Act, attention: Attention, where: Places, args: tuple[Any, ...], kwargs: dict[str, Any],
    mixed: Mixed,
) -> Any:  # fmt: skip
    """Runs a block's forward on rows that its attention has mixed."""

    def give(*_: Any, **__: Any) -> Any:
        few = mixed.given if attention.last is None else attention.last(mixed.given)
        return with_hidden(mixed.output, few)

    args, kwargs = called_with(args, kwargs, mixed.entered)
    with swapped(where, [(attention.module, give)]):
        return forward(*args, **kwargs)
