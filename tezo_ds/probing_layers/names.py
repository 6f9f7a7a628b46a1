"""Layers and kinds of matrices by their names, and patterns of `include` that match just some of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from tezo_ds.directions.space import Matrix
from tezo_ds.patterns import numbered_layers, numbered_module
from tezo_ds.probing_layers.measure import Band

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of an expert, within a layer


@dataclass(frozen=True)
class Place:
    """Place of a matrix in a model.

    Attributes:
        name: the parameter's name.
        layer: index among the model's numbered layers; None outside of them.
        kind: the rest of the name, any number in it a *, as mlp.experts.*.up_proj.weight.
    """

    name: str
    layer: int | None
    kind: str

    @property
    def short(self) -> str:
        """The kind's last word that says something."""
        return self.kind.removesuffix(".weight").rpartition(".")[2]


def places_of(matrices: Sequence[str], parameters: Sequence[str]) -> list[Place]:
    """Returns the place of each matrix.

    Args:
        matrices: names of matrices.
        parameters: names of all parameters of the model, in its order.
    """
    index = {layer: i for i, layer in enumerate(numbered_layers(parameters))}
    found = []
    for name in matrices:
        layer = numbered_module(name)
        if layer not in index:
            found.append(Place(name, None, _NUMBER.sub("*", name)))
        else:
            rest = name.removeprefix(f"{layer}.")
            found.append(Place(name, index[layer], _NUMBER.sub("*", rest)))
    return found


def bands_of(matrices: Sequence[Matrix], parameters: Sequence[str], together: int) -> list[Band]:
    """Returns matrices in groups that move together, band by band of the layers.

    Args:
        matrices: matrices, in the model's order.
        parameters: names of all parameters of the model, in its order.
        together: layers of a band, counted from the last one; matrices of one kind in a band are a group. A
            matrix outside of the layers is a group, and a band, by itself.
    """
    count = len(numbered_layers(parameters))
    bands: dict[object, dict[str, list[Matrix]]] = {}
    places = places_of([matrix.name for matrix in matrices], parameters)
    for matrix, place in zip(matrices, places, strict=True):
        band = matrix.name if place.layer is None else (count - 1 - place.layer) // together
        bands.setdefault(band, {}).setdefault(place.kind, []).append(matrix)
    return [list(groups.values()) for groups in bands.values()]


def globs(kinds: Collection[str], layers: Sequence[str]) -> list[str]:
    """Returns globs of some kinds in some layers, as model.layers.2[4-9].mlp.up_proj.weight."""
    numbers: dict[str, list[int]] = {}
    for layer in layers:
        parent, _, number = layer.rpartition(".")
        numbers.setdefault(parent, []).append(int(number))
    return [
        f"{parent}.{part}.{kind}"
        for kind in kinds
        for parent, held in numbers.items()
        for first, last in _runs(sorted(held))
        for part in range_globs(first, last)
    ]


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields first and last of each run of ascending numbers without a gap."""
    start = before = numbers[0]
    for number in numbers[1:]:
        if number != before + 1:
            yield start, before
            start = number
        before = number
    yield start, before


def range_globs(first: int, last: int) -> Iterator[str]:
    """Yields globs that together match just the numbers from `first` to `last`: 8-25 gives [8-9], 1[0-9] and
    2[0-5]."""
    while first <= last:
        size = 1  # of a block of numbers with the same first digits
        while first % (10 * size) == 0 < first and first + 10 * size - 1 <= last:
            size *= 10
        digit = first // size % 10
        more = min(9 - digit, (last - first + 1) // size - 1)
        one = f"{digit}" if more == 0 else f"[{digit}-{digit + more}]"
        yield str(first // size)[:-1] + one + "[0-9]" * (len(str(size)) - 1)
        first += (more + 1) * size
