"""What comes after the trunk, in all branches of a forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from tezo_ds.trunk.alike import Alike
from tezo_ds.trunk.found import Attention, Found
from tezo_ds.trunk.outputs import unknown
from tezo_ds.trunk.passes import through_attention, through_rest
from tezo_ds.trunk.rows import Rows
from tezo_ds.trunk.stand_ins import Act
from tezo_ds.trunk.tail import Mixed, labelled_alone, rows_alone


@dataclass(frozen=True)
class Way:
    """What a rest leaves out.

    Attributes:
        tail: attention of the last block, behind which labelled positions alone go on; None: all do.
        shares: whether the first block that trains makes products of equal rows once.
    """

    tail: Attention | None = None
    shares: bool = True


def ways_of(found: Found) -> Iterator[Way]:
    """Yields what can be left out of a model, if its code allows it: the most first."""
    if found.first == len(found.blocks):
        yield Way(shares=False)
        return
    if (attention := found.attention) is not None:
        if attention.alike:
            yield Way(attention)
        if attention.last is not None:
            yield Way(replace(attention, alike=False))
        yield Way(replace(attention, last=None, alike=False))
    yield Way()
    yield Way(shares=False)


@dataclass
class Kept:
    """What forwards of the same examples have in common, by part of a batch.

    Attributes:
        hidden: hidden states after the trunk.
        mixed: rows of labelled positions that the last attention has mixed, of one copy.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    mixed: dict[int, Mixed] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A forward of all branches, with what enters its rest.

    Attributes:
        forward: the model's.
        inputs: branches * B rows of them.
        one: those of one copy, B rows.
        hidden: hidden states after the trunk, (B, T, hidden).
        branches: number of copies.
        positions: places with a label, int64 (k,) of the flattened (B * T); None: all may be read.
        part: which part of a batch its examples are.
    """

    forward: Act
    inputs: dict[str, Any]
    one: dict[str, Any]
    hidden: Tensor
    branches: int
    positions: Tensor | None
    part: int


class Rest:
    """The blocks after the trunk, and what follows them.

    Attributes:
        way: what they leave out.
        trying: whether the ways are tried out, where they save nothing, too.
        behind: whether modules run on rows of labelled positions alone at the moment.
    """

    def __init__(self) -> None:
        self.way = Way()
        self.trying = self.behind = False
        self._alike: Alike | None = None  # of this forward
        self._standing: Rows | None = None  # of the same

    def __call__(self, found: Found, entry: Entry, kept: Kept | None) -> Any:
        """Returns the model's outputs; what `kept` has of the last attention is not computed again."""
        tail, block, positions = self.way.tail, found.blocks[-1], entry.positions
        alone: Any = nullcontext()
        if tail is not None and positions is not None:
            several = entry.branches > 1 or self.trying or kept is not None
            if tail.alike and several and entry.inputs.get("past_key_values") is None:
                return self._behind(found, tail, entry, positions, kept)
            alone = labelled_alone(
                block, tail, found.places, positions, entry.branches, self._going_behind
            )
        copies = entry.hidden.repeat(entry.branches, 1, 1)
        with self._sharing(found, copies, entry.hidden), alone:
            return through_rest(found, entry.forward, entry.inputs, copies)

    def _behind(
        self, found: Found, tail: Attention, entry: Entry, positions: Tensor, kept: Kept | None
    ) -> Any:
        """Returns the model's outputs where nothing trains before the last map of the last attention, which
        runs on one copy."""
        hidden, branches = entry.hidden, entry.branches
        mixed = None if kept is None else kept.mixed.get(entry.part)
        if mixed is None:
            mixed = through_attention(found, tail, entry.forward, entry.one, hidden)
            mixed = mixed.of_rows(positions, 1)
        if kept is not None:
            kept.mixed[entry.part] = mixed
        self._standing = Rows(self._going_behind)
        rows = rows_alone(
            found.blocks[-1], tail, found.places, mixed.repeated(branches), self._standing
        )
        after = self._standing.within(module for module, _ in found.after)
        copies = unknown(hidden, (branches * len(hidden), *hidden.shape[1:]))
        try:
            with rows, after:
                return through_rest(found, entry.forward, entry.inputs, copies)
        finally:
            self._standing = None

    @contextmanager
    def _going_behind(self) -> Iterator[None]:
        self.behind = True
        try:
            yield
        finally:
            self.behind = False

    @contextmanager
    def _sharing(self, found: Found, copies: Tensor, hidden: Tensor) -> Iterator[None]:
        """Context manager: the first block that trains makes products of equal rows once."""
        block = found.blocks[found.first] if self.way.shares else None
        several = len(copies) > len(hidden) or self.trying
        if block is None or not several or "forward" in block.__dict__:  # which is compiled
            yield
            return
        self._alike = Alike(copies, hidden)
        try:
            with self._alike.within(block):
                yield
        finally:
            self._alike = None

    def product(self, forward: Act, x: Tensor) -> Tensor:
        """Returns a layer's `forward(x)`, made once where x is the same in all branches."""
        return forward(x) if self._alike is None else self._alike.product(forward, x)

    def rows_of(self, x: Tensor) -> Tensor | None:
        """Returns rows of labelled positions, (branches, k, width), that hidden states behind the last block
        stand for; None where they are those of all positions."""
        return None if self._standing is None else self._standing.of(x)
