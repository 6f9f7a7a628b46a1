"""The fused probe with changes of each example's own: row (b, i) of a branch-major batch sees Δ_bi.

To the layers a batch of B examples in k branches is one of B·k branches of a single example. Only where
labelled positions alone are left of a copy's B·T a row's place does not tell its example; the objective does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from tezo_ds.adapters.found import Adapters
from tezo_ds.adapters.sites import AdapterSite
from tezo_ds.directions.branches import Branches, LowRank
from tezo_ds.directions.lowrank import Factors
from tezo_ds.models.structure import embeddings
from tezo_ds.per_example.objective import ExampleObjective
from tezo_ds.probes.fused import FusedProbe
from tezo_ds.probes.sites import Group, Site
from tezo_ds.probes.vectors import VectorSite
from tezo_ds.sharding.base import Sharding


class ExampleBranches(LowRank):
    """Changes Δ_bi of branch b and example i, in the order of a branch-major batch.

    Args:
        changes: as many as branches times examples; c is (branches * examples, copies, D).
        branches: number of branches.
    """

    def __init__(self, changes: LowRank, branches: int) -> None:
        super().__init__(changes.c, changes.factors, changes.idle)
        self.branches = branches

    @property
    def of_first(self) -> LowRank:
        """Changes of the first example in each branch."""
        return LowRank(self.c[:: len(self) // self.branches], self.factors, self.idle)


class ExampleProbe(FusedProbe):
    """The fused probe, which takes `ExampleBranches` besides branches that all examples share."""

    def __init__(
        self, sharding: Sharding, factors: Factors, objective: ExampleObjective,
        adapters: Adapters | None = None,
    ) -> None:  # fmt: skip
        super().__init__(sharding, factors, adapters)
        self._objective, self._head = objective, embeddings(sharding.module, "output")
        self._own: ExampleBranches | None = None
        self._seen: dict[
            str, int
        ] = {}  # labelled positions of this forward that each site has passed

    @contextmanager
    def held(self, branches: Branches) -> Iterator[None]:
        """Context manager: forwards inside see each example's own changes where they are such."""
        self._own = branches if isinstance(branches, ExampleBranches) else None
        try:
            with super().held(branches):
                yield
        finally:
            self._own = None

    def _expect(self, inputs: tuple[Any, ...]) -> None:
        if self._own is not None:
            rows = max(len(value) for value in inputs if isinstance(value, Tensor) and value.dim())
            # An example of each branch, by which the output layer is tried out: all is the first example's.
            now = self._own if rows == len(self._own) else self._own.of_first
            if len(now) != self._branches:
                self._branches = len(now)
                self._start(now)
                self._set_changes(now)
            self._seen.clear()
        super()._expect(inputs)

    def _add(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        chosen = self._chosen(site, x)
        if chosen is None:
            return super()._add(site, x, y)
        if not len(chosen):  # no position of this rank carries a label
            site.calls += 1
            return y
        with self._rows_of(chosen), _given(site.group, chosen):
            return super()._add(site, x, y)

    def _add_vectors(self, site: VectorSite | AdapterSite, x: Tensor, y: Tensor) -> Tensor:
        chosen = self._chosen(site, x)
        if chosen is None:
            return super()._add_vectors(site, x, y)
        if not len(chosen):
            site.calls += 1
            return y
        every = self._changes
        self._changes = site.chosen(every, chosen)
        try:
            with self._rows_of(chosen):
                return super()._add_vectors(site, x, y)
        finally:
            self._changes = every

    @contextmanager
    def _rows_of(self, chosen: Tensor) -> Iterator[None]:
        """Context manager: each row of a site's input inside is a branch, as of (branches, k, …) or
        (branches * k, …)."""
        before = self._branches, self._leads
        self._branches, self._leads = len(chosen), {*self._leads, len(chosen), self._copies}
        try:
            yield
        finally:
            self._branches, self._leads = before

    @property
    def _copies(self) -> int:
        return 0 if self._own is None else self._own.branches

    def _chosen(self, site: Site | VectorSite | AdapterSite, x: Tensor) -> Tensor | None:
        """Returns the row of c of each row of an input of labelled positions alone, int64 (branches * k,);
        None for an input of all positions."""
        copies, owners = self._copies, self._objective.owners
        if not copies or self._branches == copies:  # a single example
            return None
        if not (site.module is self._head or (self.trunk is not None and self.trunk.rest.behind)):
            return None
        if x.dim() > 2 and x.shape[0] == copies:
            count = x.shape[1]
        elif site.module is not self._head and x.shape[0] == copies * len(owners):
            count = len(owners)
        else:  # logits of all positions
            return None
        first = self._seen.get(site.path, 0)
        self._seen[site.path] = (first + count) % len(owners)
        examples = self._branches // copies
        of_one = owners[first : first + count]
        rows = (examples * of_one.new_tensor(range(copies))[:, None] + of_one).flatten()
        return rows.to(x.device)


@contextmanager
def _given(group: Group, rows: Tensor) -> Iterator[None]:
    """Context manager: a group's terms inside are of some rows of c, int64 (k,), as of k branches."""
    whole, group.c = group.c, group.c[rows]
    try:
        yield
    finally:
        group.c = whole
