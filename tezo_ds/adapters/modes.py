"""Modes of a tensor train: sizes whose product is a layer's size, or a little more."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from tezo_ds.errors import ConfigError

Modes = tuple[int, ...]
UNEVEN = 1.5  # largest mode, at most, over the root that all modes would be
LARGEST = 32  # of the modes that are chosen


def balanced(size: int) -> Modes:
    """Returns modes for a size, in ascending order and near each other: factors of the size itself where it
    has such, and else of the next number that has. Rows or columns above the size are left out.

    A train has Σ modes · rank² numbers, least where modes are alike. 576 = 8·8·9, 4096 = 16·16·16, 6656 =
    16·16·26; the prime 577 is taken for a part of 585 = 5·9·13.
    """
    count = 1 if size < 4 else 2 if size <= LARGEST else 3
    while LARGEST**count < size:
        count += 1
    most = math.floor(UNEVEN * math.ceil(round(size ** (1 / count), 9)))
    product = size
    while not (found := min(_factorings(product, count, most), key=sum, default=())):
        product += 1
    return found


def _factorings(product: int, count: int, most: int, least: int = 1) -> Iterator[Modes]:
    """Yields all ways to write a product as ascending factors, none above `most`."""
    if count == 1:
        if least <= product <= most:
            yield (product,)
        return
    for first in range(least, min(most, math.isqrt(product)) + 1):
        if product % first == 0:
            for rest in _factorings(product // first, count - 1, most, first):
                yield (first, *rest)


def divided(modes: Sequence[int], size: int, bottleneck: int) -> tuple[Modes, Modes]:
    """Divides modes as users give them, those of the layer's size first, into these and the bottleneck's.

    Args:
        modes: such as 16, 16, 16, 4, 4, 4 of 4096 and 64; products may be larger than the sizes.
        size: the layer's size.
        bottleneck: size between the adapter's two layers.

    Raises:
        ConfigError: the products are too small, or modes are left over.
    """
    cut = next((k for k in range(1, len(modes)) if math.prod(modes[:k]) >= size), None)
    wanted = f"{size} and then of the bottleneck {bottleneck}"
    example = ", ".join(map(str, (*balanced(size), *balanced(bottleneck))))
    if cut is None or math.prod(modes[cut:]) < bottleneck:
        raise ConfigError(
            f"tt_modes: the product of {', '.join(map(str, modes))} does not fit: they are to be modes of "
            f"{wanted}; use e.g. {example}, or leave tt_modes out"
        )
    if math.prod(modes[cut:-1]) >= bottleneck and len(modes) - cut > 1:
        raise ConfigError(
            f"tt_modes: {', '.join(map(str, modes))} are more than modes of {wanted}; take the last away, or "
            f"use e.g. {example}"
        )
    return tuple(modes[:cut]), tuple(modes[cut:])
