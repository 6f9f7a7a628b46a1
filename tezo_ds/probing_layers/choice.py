"""A recommended `include`: kinds of matrices in the last layers, by what they are foreseen to gain.

Candidates are, for each n, the last n layers with the best kind there, the best two, … and all; and all that
was measured. Only sums over many matrices are compared: the figures of single ones are mostly noise, and
the best of thousands of sets would be the luckiest. A set's score is its `Figures.decreases` less a standard
error. Of the sets whose score is at least `CLOSE` times the best, the one whose first layer is the latest is
taken, as its steps cost least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tezo_ds.patterns import matching, numbered_layers
from tezo_ds.probing_layers.figures import Figures, Horizon, standard_error
from tezo_ds.probing_layers.measure import Measured
from tezo_ds.probing_layers.names import Place, globs, places_of

CLOSE = 0.9


@dataclass(frozen=True)
class Row:
    """One group of matrices, of one kind, with the places of all of them, and their figures."""

    places: tuple[Place, ...]
    figures: Figures

    @property
    def kind(self) -> Place:
        """The first of the places, which stands for the kind."""
        return self.places[0]

    @property
    def layer(self) -> int | None:
        """The first of the layers; None outside of them."""
        return self.places[0].layer

    @property
    def layers(self) -> str:
        """Indices of the layers, as 3 or 24-29; others where there are none."""
        first, last = self.places[0].layer, self.places[-1].layer
        if first is None:
            return "others"
        return f"{first}" if first == last else f"{first}-{last}"


@dataclass(frozen=True)
class Candidate:
    """A set of matrices that might train.

    Attributes:
        include: patterns that match these matrices, and no other that was measured.
        names: their names.
        figures: their figures together.
        first: index of the first layer that trains.
        decrease, error: what N steps are foreseen to take off the loss, and its standard error.
    """

    include: tuple[str, ...]
    names: tuple[str, ...]
    figures: Figures
    first: int
    decrease: float
    error: float

    @property
    def score(self) -> float:
        """The decrease less its standard error."""
        return self.decrease - self.error


def rows_of(measured: Sequence[Measured], parameters: Sequence[str]) -> list[Row]:
    """Returns a row for each group that was measured; `parameters` are the names of all of the model's."""
    return [
        Row(tuple(places_of([m.name for m in one.group], parameters)), Figures.of(one))
        for one in measured
    ]


def by_kind(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Returns rows by kind, in the order of the model."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.kind.kind, []).append(row)
    return kinds


def candidates(
    rows: Sequence[Row], parameters: Sequence[str], include: Sequence[str], horizon: Horizon
) -> list[Candidate]:
    """Returns the sets to choose from, the smallest number of layers first, and everything last.

    Args:
        rows: all that was measured.
        parameters: names of all parameters of the model that have two dims or more, in its order.
        include: patterns that all rows were chosen by.
        horizon: what is foreseen.
    """
    layers = numbered_layers(parameters)
    found = []
    for count in range(1, len(layers) + 1):
        first = len(layers) - count
        late = [row for row in rows if row.layer is not None and row.layer >= first]
        if not any(row.layer == first for row in late):
            continue
        groups = [
            (kind, group, Figures.total(row.figures for row in group))
            for kind, group in by_kind(late).items()
        ]
        groups.sort(key=lambda one: one[2].gains(horizon.batch)[0].item(), reverse=True)
        for best in range(1, len(groups) + 1):
            chosen = [row for _, group, _ in groups[:best] for row in group]
            if not any(row.layer == first for row in chosen):
                continue
            kinds = [kind for kind, _, _ in groups[:best]]
            patterns = _patterns(chosen, kinds, layers[first:], parameters)
            found.append(_candidate(chosen, patterns, first, horizon))
    every = list(rows)
    found.append(_candidate(every, tuple(include), -1, horizon))
    return found


def _patterns(
    chosen: Sequence[Row], kinds: Sequence[str], layers: Sequence[str], parameters: Sequence[str]
) -> tuple[str, ...]:
    last = f"last:{len(layers)}"
    if matching([last], parameters) == {place.name for row in chosen for place in row.places}:
        return (last,)
    return tuple(globs(kinds, layers))


def _candidate(
    rows: Sequence[Row], include: tuple[str, ...], first: int, horizon: Horizon
) -> Candidate:
    figures = Figures.total(row.figures for row in rows)
    decreases = figures.decreases(horizon)
    names = tuple(place.name for row in rows for place in row.places)
    error = standard_error(decreases)
    return Candidate(include, names, figures, first, decreases[0].item(), error)


def choose(sets: Sequence[Candidate]) -> Candidate | None:
    """Returns the set to train; None if none is foreseen to gain more than a standard error."""
    best = max(one.score for one in sets)
    if not best > 0:
        return None
    close = [one for one in sets if one.score >= CLOSE * best]
    return max(close, key=lambda one: (one.first, one.score))
