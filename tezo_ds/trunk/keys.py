"""Keys and values of a forward that is split at the trunk: the trunk's are of one copy, the rest's of all."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def apart(cache: Any, first: int, branches: int) -> Iterator[None]:
    """Context manager, between the two passes: the cache holds nothing of the first blocks inside, so that
    the rest's masks and positions begin where the trunk's did; then what they hold is repeated for all
    branches.

    Args:
        cache: transformers' cache of the forward, or None; nothing is done then.
        first: number of blocks in the trunk.
        branches: copies of the batch in the rest.
    """
    if cache is None:
        yield
        return
    aside = cache.layers[:first]
    cache.layers[:first] = [_emptied(layer) for layer in aside]
    try:
        yield
    finally:
        cache.layers[:first] = aside
    for layer in aside:
        if layer.is_initialized:
            layer.keys = layer.keys.repeat(branches, 1, 1, 1)  # (branches * B, heads, T, size)
            layer.values = layer.values.repeat(branches, 1, 1, 1)


def _emptied(layer: Any) -> Any:
    made = copy.copy(layer)
    made.reset()
    return made
