"""Where a trainable matrix acts in a model, and how a term is added there without editing it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The modules whose weight acts in one known way, and the torch.nn.functional name it goes through.
KINDS: dict[type[nn.Module], str] = {nn.Linear: "linear", nn.Embedding: "embedding"}


def kind_of(module: nn.Module) -> str | None:
    """ "linear", "embedding", or None for a module that the fused probe does not know."""
    return next((name for base, name in KINDS.items() if isinstance(module, base)), None)


def users(module: nn.Module, names: set[str]) -> Iterator[tuple[str, nn.Module, str]]:
    """(parameter name, module, its attribute) of each use of the named parameters in a model."""
    by_id = {id(p): name for name, p in module.named_parameters() if name in names}
    for owner in module.modules():
        for attribute, parameter in owner.named_parameters(recurse=False):
            if name := by_id.get(id(parameter)):
                yield name, owner, attribute


def uncovered(module: nn.Module, names: set[str]) -> dict[str, str]:
    """Those of the named parameters that act elsewhere than as a Linear's or Embedding's weight,
    and where that is."""
    gaps: dict[str, str] = {}
    for name, owner, attribute in users(module, names):
        if kind_of(owner) is None or attribute != "weight":
            gaps[name] = f"{attribute} of {type(owner).__name__}"
        elif getattr(owner, "max_norm", None) is not None:
            gaps[name] = "Embedding with max_norm, which rewrites its weight in every forward"
    return gaps


class Site:
    """One module through which a trainable matrix acts; a tied matrix has two.

    Factors lie as their products read them fastest (BLAS takes twice as long the other way round).
    """

    def __init__(
        self, path: str, module: nn.Module, name: str, U: Tensor, V: Tensor, split: bool
    ) -> None:
        self.path, self.module, self.name = path, module, name
        self.split = split  # by tensor parallelism: U and V are those of this rank's block
        self.kind = kind_of(module)
        self.rank = V.shape[1]
        self.Vt = V.t().contiguous()  # (rank, n)
        # (m, rank) for an embedding, which looks up its rows; (rank, m) for a linear layer
        self.U = U if self.kind == "embedding" else U.t().contiguous()
        self.group = Group([self])
        self.calls = 0


class Group:
    """Linear sites that read the very same tensor (q, k, v; gate, up): one skinny product serves all.

    At hidden sizes of a few hundred these products are most of the probe's overhead.
    """

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        self.Vt = sites[0].Vt if len(sites) == 1 else torch.cat([site.Vt for site in sites])
        self.width = len(self.Vt)  # sum of ranks
        start = 0
        for site in sites:
            site.Vt = self.Vt[start : start + site.rank]  # the group's memory, not a second copy
            site.group, start = self, start + site.rank
        self._places = {site.path: place for place, site in enumerate(sites)}
        self._ranks = [site.rank for site in sites]
        self._c = torch.empty(0)  # (branches, 1, width)
        self._input: weakref.ref[Tensor] | None = None
        self._version = -1
        self._scaled: tuple[Tensor, ...] = ()  # by place, (rows, rank)

    def start(self, c: Tensor) -> None:
        """Takes c, (branches, 1, width), and forgets the last forward."""
        self._c, self._input = c, None

    def c(self, site: Site) -> Tensor:
        """c of one site: (branches, 1, rank)."""
        return self._c.split(self._ranks, dim=-1)[self._places[site.path]]

    def scaled(self, site: Site, x: Tensor) -> Tensor:
        """(x V) ∘ c of one site: (rows, rank), rows in branch-major order."""
        if len(self._ranks) == 1:
            return self._product(x)
        same = self._input is not None and self._input() is x and self._version == x._version
        if not same:
            self._scaled = self._product(x).split(self._ranks, dim=1)
            self._input, self._version = weakref.ref(x), x._version
        place = self._places[site.path]
        scaled = self._scaled[place]
        if place == len(self._ranks) - 1:  # of no more use, and those of all layers would pile up
            self._scaled, self._input = (), None
        return scaled

    def _product(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.Vt)  # (…, width)
        by_branch = h.view(len(self._c), -1, self.width)
        if h.dtype == self._c.dtype:
            by_branch.mul_(self._c)
        else:
            h = (by_branch * self._c).to(h.dtype)
        return h.view(-1, self.width)


class Sightings:
    """Watches one forward to see which sites read the same tensor one right after another."""

    def __init__(self) -> None:
        self._runs: list[list[Site]] = []
        self._last: weakref.ref[Tensor] | None = None
        self._version = -1

    def note(self, site: Site, x: Tensor) -> None:
        """Site reads x."""
        if self._last is not None and self._last() is x and self._version == x._version:
            self._runs[-1].append(site)
        else:
            self._runs.append([site])
        self._last, self._version = weakref.ref(x), x._version

    def join(self) -> None:
        """Makes a group of each such run; a site that was called more than once stays alone."""
        times: dict[str, int] = {}
        for site in (site for run in self._runs for site in run):
            times[site.path] = times.get(site.path, 0) + 1
        for run in self._runs:
            if len(run) > 1 and all(times[site.path] == 1 for site in run):
                Group(run)


AddTerm = Callable[[Site, Tensor, Tensor], Tensor]  # (site, input, output) -> output with the term


@contextmanager
def attached(sites: list[Site], add: AddTerm) -> Iterator[None]:
    """Within it, each site's forward passes its result through `add`."""
    before = [site.module.__dict__.get("forward") for site in sites]
    for site in sites:
        site.module.__dict__["forward"] = _wrapped(site, add)
    try:
        yield
    finally:
        for site, forward in zip(sites, before, strict=True):
            del site.module.__dict__["forward"]
            if forward is not None:
                site.module.__dict__["forward"] = forward


def _wrapped(site: Site, add: AddTerm) -> Callable[..., Tensor]:
    forward = site.module.forward
    if type(site.module).forward in (nn.Linear.forward, nn.Embedding.forward):

        def plain(input: Tensor) -> Tensor:  # torch's own name, as some call it by keyword
            return add(site, input, forward(input))

        return plain

    # A subclass that does more around its product or lookup (OPT's offset, Gemma's scale): the term
    # goes in at the very call that uses the weight.
    def intercepted(*args: Any, **kwargs: Any) -> Tensor:
        assert site.kind is not None
        original = getattr(F, site.kind)

        def call(input: Tensor, weight: Tensor, *rest: Any, **more: Any) -> Tensor:
            y = original(input, weight, *rest, **more)
            return add(site, input, y) if weight is site.module.weight else y

        setattr(F, site.kind, call)
        try:
            return forward(*args, **kwargs)
        finally:
            setattr(F, site.kind, original)

    return intercepted
