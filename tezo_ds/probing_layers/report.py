"""What was found of each matrix, as tables for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from tezo_ds.probing_layers.choice import Candidate, Row, by_kind
from tezo_ds.probing_layers.figures import Figures, Horizon, standard_error

HEAD = ("matrices", "s", "S", "tr H", "s / 2 tr H", "gain")


@dataclass(frozen=True)
class Found:
    """All that a probe of the layers found.

    Attributes:
        rows: a row for each group of matrices.
        sets: the sets of matrices that were compared.
        chosen: the set to train; None: no set's gain is clear of noise.
        horizon: what was foreseen.
        examples: examples that were measured.
        columns: columns of each matrix, at most.
        rho: ρ.
        sequences: sequences that went through blocks, those of the trunk left out.
    """

    rows: Sequence[Row]
    sets: Sequence[Candidate]
    chosen: Candidate | None
    horizon: Horizon
    examples: int
    columns: int
    rho: float
    sequences: int

    @property
    def matrices(self) -> int:
        """Number of all matrices."""
        return sum(row.figures.matrices for row in self.rows)

    def tables(self) -> Iterator[Table]:
        """Yields the tables: by kind of matrix, by layer, and of sets that might train."""
        yield self._table("kind", ((g[0].kind.short, g) for g in by_kind(self.rows).values()))
        yield self._table("layer", self._by_layer())
        yield self._compared()

    def _by_layer(self) -> Iterator[tuple[str, list[Row]]]:
        for name in dict.fromkeys(row.layers for row in self.rows):
            yield name, [row for row in self.rows if row.layers == name]

    def _table(self, what: str, groups: Iterator[tuple[str, list[Row]]]) -> Table:
        table = _empty(what, *HEAD)
        for name, rows in groups:
            table.add_row(name, *self._cells(Figures.total(row.figures for row in rows)))
        return table

    def _cells(self, figures: Figures) -> list[str]:
        gains = figures.gains(self.horizon.batch)
        sums = zip((figures.gradient, figures.noise, figures.trace), figures.errors, strict=True)
        return [
            f"{figures.matrices}",
            *(_with_error(number, error) for number, error in sums),
            f"{figures.ratio:.2g}",
            _with_error(gains[0].item(), standard_error(gains)),
        ]

    def _compared(self) -> Table:
        """Returns the table of the last layers in all kinds, of everything, and of what is chosen."""
        table = _empty("include", *HEAD, f"after {self.horizon.steps}")
        whole = [one for one in self.sets if one.include[0].startswith("last:") or one.first < 0]
        chosen = [] if self.chosen is None else [self.chosen]
        for one in dict.fromkeys((*whole, *chosen)):
            name = short(one) + (" (recommended)" if one is self.chosen else "")
            table.add_row(name, *self._cells(one.figures), _with_error(one.decrease, one.error))
        return table

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON has it; standard errors under names that end in _error."""
        chosen = self.chosen
        recommended = None
        if chosen is not None:
            recommended = {
                "include": list(chosen.include), "decrease": chosen.decrease,
                "decrease_error": chosen.error, **self._fields(chosen.figures),
            }  # fmt: skip
        return {
            "examples": self.examples, "columns": self.columns, "rho": self.rho,
            "batch_size": self.horizon.batch, "directions": self.horizon.steps,
            "sequences": self.sequences, "recommended": recommended,
            "groups": [
                {
                    "kind": row.kind.short, "layers": row.layers,
                    "names": [place.name for place in row.places], **self._fields(row.figures),
                }
                for row in self.rows
            ],
            "sets": [
                {
                    "include": list(one.include), "decrease": one.decrease,
                    "decrease_error": one.error, **self._fields(one.figures),
                }
                for one in self.sets
            ],
        }  # fmt: skip

    def _fields(self, figures: Figures) -> Mapping[str, float]:
        s, noise, trace = figures.errors
        gains = figures.gains(self.horizon.batch)
        return {
            "coefficients": figures.coefficients, "s": figures.gradient, "s_error": s,
            "S": figures.noise, "S_error": noise, "tr_H": figures.trace, "tr_H_error": trace,
            "gain_without_noise": figures.ratio, "gain": gains[0].item(),
            "gain_error": standard_error(gains),
        }  # fmt: skip


def _empty(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 1))
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _with_error(number: float, error: float) -> str:
    return f"{number:.3g} ± {error:.2g}"


def short(one: Candidate) -> str:
    """Returns a set's first pattern, and the number of the others."""
    more = len(one.include) - 1
    return one.include[0] + (f" and {more} more" if more else "")


def sentence(found: Found) -> str:
    """Returns the recommendation as one line, which can be pasted into a command."""
    chosen = found.chosen
    if chosen is None:
        return (
            f"no set of matrices is foreseen to gain more than a standard error: {found.examples} examples "
            "are too few to tell"
        )
    flags = " ".join(f"--include '{pattern}'" for pattern in chosen.include)
    return (
        f"recommended: {flags}  ({len(chosen.names)} of {found.matrices} matrices; foreseen to lower the "
        f"loss by {chosen.decrease:.3g} ± {chosen.error:.2g} in {found.horizon.steps} directions of batches "
        f"of {found.horizon.batch})"
    )
