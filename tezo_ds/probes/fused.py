"""The fused probe: all branches in one batch and one forward, weights only read.

    y = x Wᵀ + ((x V) ∘ c) Uᵀ        Linear
    y = W[ids] + (U[ids] ∘ c) Vᵀ     Embedding

with c = a ± ρτ of the branch that a row belongs to; `sites` has the general form, `vectors` that of
biases and norms. A batch of B examples goes in `branches` times, copy after copy, so that the rows of
one branch are contiguous ("branch-major").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from tezo_ds.branches import Branches, LowRank
from tezo_ds.errors import ProbeError
from tezo_ds.lowrank import Factors
from tezo_ds.objective import Objective
from tezo_ds.probes.sites import Group, Sightings, Site, attached, kind_of
from tezo_ds.probes.vectors import VectorSite, attached_vectors, find_vector_sites
from tezo_ds.sharding.base import Sharding


class FusedProbe:
    """Adds every branch's low-rank term on the activation side.

    Keeps U and V whole on every rank (under tensor parallelism those of its block), in the dtype of
    the weights in a forward: r(m + n) numbers a matrix.
    """

    name = "fused"

    def __init__(self, sharding: Sharding, factors: Factors) -> None:
        self._sharding, self._factors = sharding, factors
        self._sites = list(_find_sites(sharding, factors))
        self._loaded: tuple[int, int] | None = None  # period and renewal of the sites' factors
        self._load()
        for site in self._sites:
            Group([site])
        self._regroup()
        vectors = {vector.name for vector in factors.space.vectors}
        self._vector_sites = list(find_vector_sites(sharding, vectors))
        self._all: list[Site | VectorSite] = [*self._sites, *self._vector_sites]
        self._changes: dict[str, Tensor] = {}  # of each vector, (branches, numel)
        self._sightings: Sightings | None = None
        self._seen = False
        self._branches = self._examples = 1
        self._leads: set[int] = set()  # sizes of a leading dim that counts branch-major rows

    def measure(self, objective: Objective, batch: Mapping[str, Any], branches: Branches) -> Tensor:
        """See `Probe`.

        Raises:
            ProbeError: a trainable matrix took no part in the forward, or a layer's input does not
                show which rows belong to which branch.
        """
        if branches.idle:
            return objective(batch, len(branches))
        if not self._seen:
            self._sightings = Sightings()
        watch = self._sharding.module.register_forward_pre_hook(self._expect, with_kwargs=True)
        try:
            with self.held(branches):
                result = objective(batch, len(branches))
        finally:
            watch.remove()
        idle = sorted({site.name for site in self._all if site.calls == 0})
        if idle:
            raise ProbeError(
                f"{idle[0]} took no part in the forward ({len(idle)} such); "
                f'add it to exclude, e.g. exclude: ["{idle[0]}"]'
            )
        if self._sightings is not None:
            self._sightings.join()
            self._regroup()
            self._seen, self._sightings = True, None
        return result

    @contextmanager
    def held(self, branches: Branches) -> Iterator[None]:
        """See `Probe`; here for any number of branches, as many as a forward has copies."""
        if branches.idle:
            yield
            return
        assert isinstance(branches, LowRank), "dense directions are for the in-place probe"
        self._branches = len(branches)
        self._load()
        # All columns at once into the order of the groups, each of which then takes a view.
        c = branches.c.to(self._sharding.device)[..., self._columns]  # (branches, copies, widths)
        by_dtype = {dtype: c.to(dtype) for dtype in {_wide(group) for group in self._groups}}
        start = 0
        for group in self._groups:
            group.start(by_dtype[_wide(group)][..., start : start + group.width])
            start += group.width
        self._set_changes(branches)
        for site in self._all:
            site.calls = 0
        with (
            attached(self._sites, self._add),
            attached_vectors(self._vector_sites, self._add_vectors),
        ):
            yield

    def _set_changes(self, branches: LowRank) -> None:
        space = self._factors.space
        c = branches.c[:, 0, space.of_vectors].to(self._sharding.device)
        for vector in space.vectors:
            part, start = space.slices[vector.name], space.of_vectors.start
            wide = torch.promote_types(vector.dtype, torch.float32)
            self._changes[vector.name] = c[:, part.start - start : part.stop - start].to(wide)

    def _load(self) -> None:
        """Takes the factors as they are now."""
        now = self._factors.period, self._factors.renewed
        before, self._loaded = self._loaded, now
        if before == now:
            return
        device = self._sharding.device
        for name, sites in groupby(sorted(self._sites, key=_name), key=_name):
            block, right = None, None
            for site in sites:
                if block is None:  # of tied sites the first
                    block = site.block
                    left = self._factors.left(name, block.rows, device)
                    if before is None or before[0] != now[0]:
                        right = self._factors.right(name, block.columns, device)
                site.load(left, right)
                self._factors.lend(name, site.block, site.factors)

    def _regroup(self) -> None:
        self._groups = list({id(site.group): site.group for site in self._sites}.values())
        slices, device = self._factors.space.slices, self._sharding.device
        parts = [slices[site.name] for group in self._groups for site in group.sites]
        columns = [column for part in parts for column in range(part.start, part.stop)]
        self._columns = torch.tensor(
            columns, dtype=torch.int64, device=device
        )  # of c, group by group

    def _expect(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes, before each forward, the shapes by which a layer's input shows its branches:
        (branches * B, …) as the batch goes in, (branches * B * T, …) flattened, (branches, …) at the
        output layer."""
        inputs = (*args, *kwargs.values())
        shapes = [value.shape for value in inputs if isinstance(value, Tensor) and value.dim()]
        rows = max(shape[0] for shape in shapes)
        self._examples = rows // self._branches
        lengths = {shape[1] for shape in shapes if len(shape) > 1}
        self._leads = {rows, self._branches, *(rows * length for length in lengths)}

    def _add(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """y plus the site's term."""
        site.calls += 1
        result = y = y.contiguous()
        if site.split:
            x, y = self._sharding.local(x, y)
        if self._branches > 1 and (not x.dim() or x.shape[0] not in self._leads):
            return self._add_shared(site, x, y)
        if site.kind == "embedding":
            return y.add_(site.group.looked_up(site, x, self._branches).view(y.shape))
        if self._sightings is not None and site.kind == "linear":
            self._sightings.note(site, x)
        y.view(-1, y.shape[-1]).addmm_(*site.group.term(site, x))
        return result

    def _add_vectors(self, site: VectorSite, x: Tensor, y: Tensor) -> Tensor:
        """y plus the terms of a site's vectors."""
        if self._branches > 1 and (not x.dim() or x.shape[0] not in self._leads):
            raise ProbeError(_unclear(site, x))
        return site.add_(x, y, self._changes)

    def _add_shared(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """One row that serves every example, as position ids of shape (1, T) do: the result must be
        (branches * B, …), as each branch adds a term of its own.

        Raises:
            ProbeError: the input is of some other shape.
        """
        if not x.dim() or x.shape[0] != 1 or site.split:
            raise ProbeError(_unclear(site, x))
        if site.kind == "embedding":
            term = site.group.looked_up(site, x, 1)
        else:
            alike = x.expand(self._branches, *x.shape[1:]).contiguous()
            scaled, outer = site.group.term(site, alike)
            term = scaled @ outer
        term = term.view(self._branches, *y.shape[1:])
        return (y + term).repeat_interleave(self._examples, dim=0)


def _unclear(site: Site | VectorSite, x: Tensor) -> str:
    return (
        f"{site.path}: input of shape {tuple(x.shape)} does not show which of its rows belong to which "
        f'branch; add "{site.name}" to exclude, or set probe to inplace'
    )


def _wide(group: Group) -> torch.dtype:
    """c stays float32 beside 16-bit weights: rounded like them, ±ρτ would vanish beside a larger a."""
    return torch.promote_types(group.dtype, torch.float32)


def _name(site: Site) -> str:
    return site.name


def _find_sites(sharding: Sharding, factors: Factors) -> Iterator[Site]:
    names = {
        id(parameter): (name, sharding.block(parameter))
        for name, parameter in sharding.module.named_parameters()
        if name in factors.matrices
    }
    for path, module in sharding.module.named_modules():
        if kind_of(module) and id(module.weight) in names:
            name, block = names[id(module.weight)]
            whole = block.covers(factors.matrices[name].shape)
            yield Site(path, module, name, block, not whole)
