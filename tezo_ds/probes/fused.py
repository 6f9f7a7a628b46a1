"""The fused probe: all branches in one batch and one forward, weights only read.

    y = x Wᵀ + ((x V) ∘ c) Uᵀ        Linear
    y = W[ids] + (U[ids] ∘ c) Vᵀ     Embedding

with c = a ± ρτ of the branch that a row belongs to. A batch of B examples goes in `branches` times,
copy after copy, so that the rows of one branch are contiguous ("branch-major").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tezo_ds.errors import ProbeError
from tezo_ds.factors import CoefficientSpace
from tezo_ds.lowrank import ShardFactors
from tezo_ds.objective import Objective
from tezo_ds.probes.sites import Group, Sightings, Site, attached, kind_of
from tezo_ds.sharding.base import Sharding


class FusedProbe:
    """Adds every branch's low-rank term on the activation side.

    Keeps U and V whole on every rank (under tensor parallelism those of its block), in the dtype of
    the weights in a forward: r(m + n) numbers a matrix.
    """

    name = "fused"

    def __init__(self, sharding: Sharding, space: CoefficientSpace) -> None:
        self._sharding, self._space = sharding, space
        self._sites = list(_find_sites(sharding, space))
        self._regroup()
        self._sightings: Sightings | None = None
        self._seen = False
        self._branches = self._examples = 1
        self._leads: set[int] = set()  # sizes of a leading dim that counts branch-major rows

    def measure(self, objective: Objective, batch: Mapping[str, Any], c: Tensor) -> Tensor:
        """See `Probe`.

        Raises:
            ProbeError: a trainable matrix took no part in the forward, or a layer's input does not
                show which rows belong to which branch.
        """
        if not c.any():  # W₀ itself
            return objective(batch, len(c))
        if not self._seen:
            self._sightings = Sightings()
        self._branches = len(c)
        watch = self._sharding.module.register_forward_pre_hook(self._expect, with_kwargs=True)
        try:
            with self._at(c):
                result = objective(batch, len(c))
        finally:
            watch.remove()
        idle = sorted({site.name for site in self._sites if site.calls == 0})
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
    def held(self, c: Tensor) -> Iterator[None]:
        """See `Probe`."""
        if not c.any():
            yield
            return
        self._branches = 1
        with self._at(c[None]):
            yield

    def _regroup(self) -> None:
        self._groups = list({id(site.group): site.group for site in self._sites}.values())
        columns = torch.arange(self._space.numel)
        names = [site.name for group in self._groups for site in group.sites]
        parts = [columns[self._space.slices[name]] for name in names]
        self._columns = torch.cat(parts).to(
            self._sharding.device
        )  # of c, in the order of the groups

    @contextmanager
    def _at(self, c: Tensor) -> Iterator[None]:
        """Within it, every site adds its term; c is (branches, D) float64."""
        # All columns at once into the order of the groups, each of which then takes a view.
        c = c.to(self._sharding.device)[:, None, self._columns]  # (branches, 1, sum of widths)
        by_dtype = {dtype: c.to(dtype) for dtype in {_wide(group) for group in self._groups}}
        start = 0
        for group in self._groups:
            group.start(by_dtype[_wide(group)][..., start : start + group.width])
            start += group.width
        for site in self._sites:
            site.calls = 0
        with attached(self._sites, self._add):
            yield

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
            return y.add_(self._embedding_term(site, x, self._branches).view(y.shape))
        if self._sightings is not None:
            self._sightings.note(site, x)
        y.view(-1, y.shape[-1]).addmm_(site.group.scaled(site, x), site.U)
        return result

    def _embedding_term(self, site: Site, ids: Tensor, copies: int) -> Tensor:
        """(U[ids] ∘ c) Vᵀ: (branches, rows, n); `copies` of the ids are there, or one for all."""
        rows = F.embedding(ids, site.U).view(copies, -1, site.U.shape[1])  # (copies, rows, rank)
        return (rows * site.group.c(site)).to(site.Vt.dtype) @ site.Vt

    def _add_shared(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """One row that serves every example, as position ids of shape (1, T) do: the result must be
        (branches * B, …), as each branch adds a term of its own.

        Raises:
            ProbeError: the input is of some other shape.
        """
        if not x.dim() or x.shape[0] != 1 or site.split:
            raise ProbeError(
                f"{site.path}: input of shape {tuple(x.shape)} does not show which of its rows "
                f'belong to which branch; add "{site.name}" to exclude, or set probe to inplace'
            )
        if site.kind == "embedding":
            term = self._embedding_term(site, x, 1)
        else:
            h = F.linear(x.reshape(1, -1, x.shape[-1]), site.Vt)
            term = (h * site.group.c(site)).to(site.U.dtype) @ site.U
        term = term.view(self._branches, *y.shape[1:])
        return (y + term).repeat_interleave(self._examples, dim=0)


def _wide(group: Group) -> torch.dtype:
    """c stays float32 beside 16-bit weights: rounded like them, ±ρτ would vanish beside a larger a."""
    return torch.promote_types(group.Vt.dtype, torch.float32)


def _find_sites(sharding: Sharding, space: CoefficientSpace) -> Iterator[Site]:
    parameters = dict(sharding.module.named_parameters())
    make = ShardFactors(space, keep=False)
    factors: dict[int, tuple[str, Tensor, Tensor, bool]] = {}
    for matrix in space.matrices:
        parameter = parameters[matrix.name]
        block = sharding.block(parameter)
        U, V = make.of(matrix.name, block, sharding.device)
        factors[id(parameter)] = matrix.name, U, V, not block.covers(matrix.shape)
    for path, module in sharding.module.named_modules():
        if kind_of(module) and id(module.weight) in factors:
            yield Site(path, module, *factors[id(module.weight)])
