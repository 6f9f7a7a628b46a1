"""Hidden states among what a block takes and gives, in whatever structure its model has for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def unknown(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns NaN of a shape, which takes no memory: it stands for what nothing must read unnoticed."""
    return like.new_full((1,), math.nan).expand(*shape)


def hidden_of(output: Any) -> Tensor:
    """Returns the hidden states of a block's output: a tensor, or the first item of a tuple or list."""
    hidden = output if isinstance(output, Tensor) else output[0]
    assert isinstance(hidden, Tensor)
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """Returns an output with other hidden states."""
    if isinstance(output, Tensor):
        return hidden
    return type(output)([hidden, *output[1:]])


def hidden_alone(output: Any) -> bool:
    """Returns whether a block's output is hidden states, and no other tensor or state."""
    if isinstance(output, Tensor):
        return True
    if type(output) not in (tuple, list) or not output or not isinstance(output[0], Tensor):
        return False
    return all(part is None for part in output[1:])


def hidden_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Returns the hidden states that a module is called with: its first argument, or first tensor by name."""
    hidden = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
    assert isinstance(hidden, Tensor)
    return hidden


def called_with(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns a module's arguments with other hidden states."""
    if args:
        return (hidden, *args[1:]), kwargs
    name = next(name for name, v in kwargs.items() if isinstance(v, Tensor))
    return args, {**kwargs, name: hidden}
