"""The fused probe: all branches in one batch and one forward, weights only read.

    y = x Wᵀ + ((x V) ∘ c) Uᵀ        Linear
    y = W[ids] + (U[ids] ∘ c) Vᵀ     Embedding

with c = a ± ρτ of the branch that a row belongs to; `sites` has the general form, `vectors` that of
biases and norms, and the room `adapters` that of small functions with parameters of their own. A batch of
B examples goes in `branches` times, copy after copy, so that the rows of one branch are contiguous
("branch-major").
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from tezo_ds.adapters.found import Adapters, adapters_of
from tezo_ds.adapters.sites import AdapterSite
from tezo_ds.config import TezoConfig
from tezo_ds.directions.branches import Branches, LowRank
from tezo_ds.directions.lowrank import Factors
from tezo_ds.errors import ProbeError
from tezo_ds.models.structure import embeddings, is_encoder_decoder, kind_of, uncovered, users
from tezo_ds.probes.base import Losses, Probe
from tezo_ds.probes.shared_inputs import readers
from tezo_ds.probes.sites import Group, Site, attached
from tezo_ds.probes.vectors import (
    VectorSite,
    attached_vectors,
    find_vector_sites,
    uncovered_vectors,
)
from tezo_ds.quantised.packed import misfits
from tezo_ds.sharding.base import Sharding
from tezo_ds.sharding.view import Block

log = logging.getLogger(__name__)

DISTANCES = "relative_attention_bias"  # module of a table of distances between positions


class FusedProbe(Probe):
    """Probe that adds every branch's low-rank term on the activation side.

    Every rank keeps U and V whole (under tensor parallelism those of its block), in the dtype of
    the weights in a forward: r(m + n) numbers a matrix.

    Attributes:
        sites, vector_sites: where matrices act, and vectors or adapters.
        around: makes a context manager in which the sites' forwards run.
    """

    name = "fused"

    def __init__(
        self, sharding: Sharding, factors: Factors, adapters: Adapters | None = None
    ) -> None:
        self._sharding, self._factors = sharding, factors
        self._adapters = adapters or Adapters()
        self.sites = list(_find_sites(sharding, factors))
        self._loaded: tuple[int, int] | None = None  # period and renewal of the sites' factors
        self._load()
        for site in self.sites:
            Group([site])
        self._regroup()
        self._vectors = factors.space.vectors[len(self._adapters.vectors) :]  # the model's own
        names = {vector.name for vector in self._vectors}
        self.vector_sites: list[VectorSite | AdapterSite] = [
            *find_vector_sites(sharding, names),
            *self._adapters.sites,
        ]
        self._all: list[Site | VectorSite | AdapterSite] = [*self.sites, *self.vector_sites]
        # Of each vector, (branches, numel); of each adapter by its site's name.
        self._changes: Mapping[str, Any] = {}
        self.around: Callable[[], AbstractContextManager[None]] = nullcontext
        self._joined = sum(map(_may_share, self.sites)) < 2  # known who shares a product
        self._branches = self._examples = 1
        self._holding = False
        # Branches, c of the groups, and changes, where rows have been seated.
        self._whole: tuple[int, list[Tensor], Mapping[str, Any]] | None = None
        self._leads: set[int] = set()  # sizes of a leading dim that counts branch-major rows

    @classmethod
    def gaps(
        cls, sharding: Sharding, names: Collection[str], factors: Factors | None
    ) -> dict[str, str]:
        if factors is None:
            return {name: "dense directions" for name in names}
        return {
            **_split_embeddings(sharding, factors),
            **_of_distances(sharding, factors),
            **uncovered(sharding.module, set(factors.matrices)),
            **_not_linear(sharding, factors),
            **uncovered_vectors(sharding, set(names) - set(factors.matrices)),
        }

    @classmethod
    def make(
        cls, config: TezoConfig, sharding: Sharding, names: Collection[str], factors: Factors | None
    ) -> FusedProbe:
        assert factors is not None, "a gap"
        return cls(sharding, factors, adapters_of(config, sharding))

    def measure(self, objective: Losses, batch: Mapping[str, Any], branches: Branches) -> Tensor:
        """Returns loss sums and counts of all branches, measured together: float64 (2, branches).

        Raises:
            ProbeError: a trainable parameter took no part in the forward, or a layer's input does not
                show which rows belong to which branch.
        """
        if branches.idle:
            return objective(batch, len(branches))
        with self.held(branches):
            result = objective(batch, len(branches))
        idle = {s.name: s for s in self._all if s.calls == 0 and not self._lent(s)}
        if idle:
            site = idle[name := min(idle)]
            where, instead = "in the forward", ""
            if isinstance(site, Site) and not site.plain:
                kind = type(site.module).__name__
                where += f" that shows to the fused probe, as {kind} has its own"
                instead = ", or set probe to inplace"
            raise ProbeError(
                f"{name} took no part {where} ({len(idle)} such); "
                f'add it to exclude, e.g. exclude: ["{name}"]{instead}'
            )
        return result

    def _lent(self, site: Site | VectorSite | AdapterSite) -> bool:
        """Returns whether a site only holds the weight that embeddings of an encoder and a decoder use."""
        module = self._sharding.module
        if not is_encoder_decoder(module) or site.module is not embeddings(module, "input"):
            return False
        return any(o.calls and o.name == site.name and o.kind == "embedding" for o in self.sites)

    @contextmanager
    def held(self, branches: Branches) -> Iterator[None]:
        """Context manager: in forwards inside, each copy of the batch sees one branch."""
        if branches.idle:
            yield
            return
        assert isinstance(branches, LowRank), "dense directions are for the in-place probe"
        self._branches = len(branches)
        self._load()
        self._start(branches)
        self._set_changes(branches)
        for site in self._all:
            site.calls = 0

        def expect(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._joined:
                self._join(args, kwargs)
                self._start(branches)
            self._expect((*args, *kwargs.values()))

        watch = self._sharding.module.register_forward_pre_hook(expect, with_kwargs=True)
        self._holding = True
        try:
            with (
                self.around(),
                attached(self.sites, self._add, self._product),
                attached_vectors(self.vector_sites, self._add_vectors),
            ):
                yield
        finally:
            watch.remove()
            self._holding, self._whole = False, None

    def seat(self, rows: Tensor | None) -> None:
        """Has row i of later forwards inside `held` see branch rows[i], int64 (k,), and not the branch of its
        place in a branch-major batch; None: that again. Does nothing where no branch changes anything."""
        if not self._holding or (rows is None and self._whole is None):
            return
        if self._whole is None:
            self._whole = self._branches, [group.c for group in self._groups], self._changes
        self._branches, cs, self._changes = self._whole
        if rows is None:
            self._whole = None
        else:
            rows = rows.to(self._sharding.device)
            cs, self._changes = [c[rows] for c in cs], _OfRows(self._changes, rows)
            self._branches = len(rows)
        for group, c in zip(self._groups, cs, strict=True):
            group.start(c)

    def _start(self, branches: LowRank) -> None:
        """Gives each group its coefficients: all columns at once into the order of the groups, each of
        which then takes a view."""
        if not self._groups:  # adapters alone: c is large, and nothing of it of matrices
            return
        c = branches.c.to(self._sharding.device)[..., self._columns]  # (branches, copies, widths)
        by_dtype = {dtype: c.to(dtype) for dtype in set(self._dtypes)}
        start = 0
        for group, dtype in zip(self._groups, self._dtypes, strict=True):
            group.start(by_dtype[dtype][..., start : start + group.width])
            start += group.width

    def _join(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Groups the sites that read one tensor, before the first forward."""
        self._joined = True
        head = embeddings(self._sharding.module, "output")  # which sees chosen positions alone
        sites = {s.path: s for s in self.sites if _may_share(s) and s.module is not head}
        try:
            runs = readers(self._sharding, sites, args, kwargs)
        except Exception as error:  # the model's code asks for values, in ways of its own
            _warn_of_own_products(error)
            return
        for run in runs:
            Group([sites[path] for path in run])
        self._regroup()

    def _set_changes(self, branches: LowRank) -> None:
        space = self._factors.space
        device = self._sharding.device
        self._changes = changes = self._adapters.prepared(branches, space, device)
        for vector in self._vectors:
            wide = torch.promote_types(vector.dtype, torch.float32)
            c = branches.part(space.slices[vector.name])[:, 0]  # (branches, numel)
            changes[vector.name] = c.to(wide).to(device)

    def _load(self) -> None:
        """Loads factors that have changed into the sites."""
        now = self._factors.period, self._factors.renewed
        before, self._loaded = self._loaded, now
        if before == now:
            return
        device = self._sharding.device
        for name, sites in groupby(sorted(self.sites, key=_name), key=_name):
            block, right = None, None
            for site in sites:
                if block is None:  # the first of tied sites
                    block = site.block
                    left = self._factors.left(name, block.rows, device)
                    if before is None or before[0] != now[0]:
                        right = self._factors.right(name, block.columns, device)
                site.load(left, right)
                self._factors.lend(name, site.block, site.factors)

    def _regroup(self) -> None:
        self._groups = list({id(site.group): site.group for site in self.sites}.values())
        self._dtypes = [_wide(group) for group in self._groups]  # of c
        slices, device = self._factors.space.slices, self._sharding.device
        parts = [slices[site.name] for group in self._groups for site in group.sites]
        columns = [column for part in parts for column in range(part.start, part.stop)]
        self._columns = torch.tensor(
            columns, dtype=torch.int64, device=device
        )  # of c, group by group

    def _expect(self, inputs: tuple[Any, ...]) -> None:
        """Notes, before each forward, the shapes by which a layer's input shows its branches:
        (branches * B, …) as the batch goes in, (branches * B * T, …) flattened, (branches, …) at the
        output layer and of the labelled positions in the last block, (branches * k, …) flattened."""
        shapes = [value.shape for value in inputs if isinstance(value, Tensor) and value.dim()]
        rows = max((shape[0] for shape in shapes), default=1)
        self._examples = rows // self._branches
        lengths = {shape[1] for shape in shapes if len(shape) > 1}
        self._leads = {rows, self._branches, *(rows * length for length in lengths)}
        if self.trunk is not None and self.trunk.rows:
            self._leads.add(self._branches * self.trunk.rows)

    def shows(self, x: Tensor) -> bool:
        """Returns whether an input's rows are branch-major."""
        return self._branches == 1 or bool(x.dim() and x.shape[0] in self._leads)

    def _product(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Returns a layer's own result, without terms."""
        return forward(x) if self.trunk is None else self.trunk.rest.product(forward, x)

    def _add(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """Returns y plus the site's term."""
        site.calls += 1
        result = y = y.contiguous()
        if site.split:
            x, y = self._sharding.local(x, y)
        if not self.shows(x):
            return self._add_shared(site, x, y)
        if site.kind == "embedding":
            return y.add_(site.group.looked_up(site, x, self._branches).view(y.shape))
        y.view(-1, y.shape[-1]).addmm_(*site.group.term(site, x))
        return result

    def _add_vectors(self, site: VectorSite | AdapterSite, x: Tensor, y: Tensor) -> Tensor:
        """Returns y plus the terms of a site's vectors, or of its adapter."""
        if not self.shows(x):
            raise ProbeError(_unclear(site, x))
        return site.add_(x, y, self._changes)

    def _add_shared(self, site: Site, x: Tensor, y: Tensor) -> Tensor:
        """Adds terms to one row that serves every example, as position ids of shape (1, T) do: the
        result is (branches * B, …), as each branch adds a term of its own.

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


class _OfRows(Mapping[str, Any]):
    """Changes of rows, each of which is of one branch; taken from those of the branches when asked for."""

    def __init__(self, of_branches: Mapping[str, Any], rows: Tensor) -> None:
        self._of, self._rows = of_branches, rows

    def __getitem__(self, name: str) -> Any:
        found = self._of[name]
        return (
            found[self._rows] if isinstance(found, Tensor) else tuple(x[self._rows] for x in found)
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)


def _may_share(site: Site) -> bool:
    """True for whole linear sites: under tensor parallelism each layer has an input of its own."""
    return site.kind == "linear" and not site.split


def _warn_of_own_products(error: Exception) -> None:
    reason = textwrap.shorten(f"{type(error).__name__}: {error}", 120, placeholder=" …")
    log.warning("probe: each layer takes a product of its own, a few percent slower (%s)", reason)


def _unclear(site: Site | VectorSite | AdapterSite, x: Tensor) -> str:
    return (
        f"{site.path}: input of shape {tuple(x.shape)} does not show which of its rows belong to which "
        f'branch; add "{site.name}" to exclude, or set probe to inplace'
    )


def _wide(group: Group) -> torch.dtype:
    """Returns c's dtype, float32 beside 16-bit weights: rounded so, ±ρτ would vanish beside a larger a."""
    return torch.promote_types(group.dtype, torch.float32)


def _name(site: Site) -> str:
    return site.name


def _find_sites(sharding: Sharding, factors: Factors) -> Iterator[Site]:
    names = {
        id(parameter): (name, sharding.block(parameter))
        for name, parameter in sharding.module.named_parameters()
        if name in factors.matrices
    }
    for name, weight in sharding.packed.items():  # whose parameters are of other shapes, if of any
        if name in factors.matrices:
            block = Block(*map(range, weight.shape))
            names[id(getattr(weight.module, "weight", weight.module))] = name, block
    for path, module in sharding.module.named_modules():
        weight = getattr(module, "weight", module)
        if kind_of(module) and id(weight) in names:
            name, block = names[id(weight)]
            whole = block.covers(factors.matrices[name].shape)
            yield Site(path, module, name, block, not whole)


def _split_embeddings(sharding: Sharding, factors: Factors) -> dict[str, str]:
    """Returns embeddings split by tensor parallelism, as torch masks other ranks' words in its own ways."""
    parameters = dict(sharding.module.named_parameters())
    shapes = {name: matrix.shape for name, matrix in factors.matrices.items()}
    return {
        name: "Embedding split by tensor parallelism"
        for name, owner, _ in users(sharding.module, set(shapes))
        if kind_of(owner) == "embedding"
        if not sharding.block(parameters[name]).covers(shapes[name])
    }


def _not_linear(sharding: Sharding, factors: Factors) -> dict[str, str]:
    """Returns packed weights whose layers do not act as y = x Ŵᵀ, where layers can be tried by themselves."""
    tried = [weight for name, weight in sharding.packed.items() if name in factors.matrices]
    alone = sharding.runs_alone
    return {f"{w.path}.weight": f"{w.kind} {why}" for w, why in misfits(tried)} if alone else {}


def _of_distances(sharding: Sharding, factors: Factors) -> dict[str, str]:
    """Returns tables that are looked up by pairs of positions (T5's, MPNet's): such an input, (T, T), would
    pass for rows of examples, and its result is the same for all of them."""
    return {
        name: "a table of distances, the same for all examples"
        for path, module in sharding.module.named_modules()
        if path.endswith(DISTANCES) and isinstance(module, nn.Embedding)
        for name in [f"{path}.weight"]
        if name in factors.matrices
    }
