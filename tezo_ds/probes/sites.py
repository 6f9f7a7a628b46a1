"""Sites where a trainable matrix acts in a model, and terms added there without editing the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tezo_ds.models.structure import acts_plainly, kind_of
from tezo_ds.sharding.view import Block
from tezo_ds.trunk.noted import Noted
from tezo_ds.trunk.stand_ins import all_replaced


class Site:
    """One module through which a trainable matrix acts; a tied matrix has two.

        linear     y += Σ_k ((x V) ∘ c_k) L_kᵀ
        conv1d     y += (Σ_k (x L_k) ∘ c_k) Vᵀ
        embedding  y += (Σ_k L_k[ids] ∘ c_k) Vᵀ

    Factors lie as their products read them fastest (BLAS takes twice as long on their transposes).

    Args:
        path: the module's path.
        module: the module that holds the weight.
        name: the parameter's name.
        block: block of the matrix that this rank multiplies with.
        split: whether the block is less than the matrix.
    """

    def __init__(self, path: str, module: nn.Module, name: str, block: Block, split: bool) -> None:
        self.path, self.module, self.name = path, module, name
        self.block, self.split = block, split
        self.kind = kind_of(module)
        self.plain = acts_plainly(module)  # asked for in each forward
        self.inner = self.outer = self.table = torch.empty(0, 0)
        self.group: Group
        self.calls = 0

    def load(self, left: Tensor, right: Tensor | None) -> None:
        """Loads L (m, copies * rank) and V (n, rank) of the block; None keeps V."""
        if right is not None:
            self.rank = right.shape[1]
            if self.kind == "linear":
                self._set_inner(right.t())
            else:
                self.outer = right.t().contiguous()  # (rank, n)
        if self.kind == "linear":
            self.outer = left.t().contiguous()  # (copies * rank, m)
        elif self.kind == "conv1d":
            self._set_inner(left.t())
        else:
            self.table = left.contiguous()

    def _set_inner(self, inner: Tensor) -> None:
        if self.inner.shape == inner.shape:
            self.inner.copy_(inner)  # it may be part of a group's memory
        else:
            self.inner = inner.contiguous()

    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns L (m, copies * rank) and V (n, rank) as views."""
        if self.kind == "linear":
            return self.outer.t(), self.inner.t()
        if self.kind == "conv1d":
            return self.inner.t(), self.outer.t()
        return self.table, self.outer.t()


class Group:
    """Sites that read the very same tensor (q, k, v; gate, up): one skinny product serves all.

    At hidden sizes of a few hundred these products are most of the probe's overhead. Only linear sites
    share one: their inner factor is V, which stays.
    """

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        if len(sites) > 1:
            self.inner = torch.cat([site.inner for site in sites])
            start = 0
            for site in sites:  # the group's memory, not a second copy
                site.inner = self.inner[start : start + site.rank]
                start += site.rank
        for site in sites:
            site.group = self
        self.places = {site.path: place for place, site in enumerate(sites)}
        self.ranks = [site.rank for site in sites]
        self.width = sum(self.ranks)  # columns of c
        self.c = torch.empty(0)  # (branches, copies, width)
        self._input: Noted | None = None
        self._scaled: tuple[Tensor, ...] = ()  # by place, (rows, copies * rank)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the factors."""
        return self.sites[0].outer.dtype

    def start(self, c: Tensor) -> None:
        """Takes c, (branches, copies, width), and forgets the last forward."""
        self.c, self._input = c, None

    def term(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a linear or conv1d site's term as two factors: (rows, k), branch-major, and (k, out)."""
        if site.kind == "conv1d":
            return summed(x, site.inner, self.c), site.outer
        return self._shared(site, x), site.outer

    def looked_up(self, site: Site, ids: Tensor, times: int) -> Tensor:
        """Returns an embedding's term, (branches, rows, n), from `times` copies of the ids, or one for
        all branches."""
        rows = F.embedding(ids, site.table).view(times, -1, *self.c.shape[1:])
        rows = (rows * self.c[:, None]).sum(dim=2)  # (branches, rows, rank)
        return rows.to(site.outer.dtype) @ site.outer

    def _shared(self, site: Site, x: Tensor) -> Tensor:
        """Returns (x V) ∘ c_k of one linear site, for every k: (rows, copies * rank)."""
        if len(self.ranks) == 1:
            return scaled(x, site.inner, self.c, self.ranks)[0]
        if self._input is None or not self._input.is_(x):
            self._scaled = scaled(x, self.inner, self.c, self.ranks)
            self._input = Noted(x)
        place = self.places[site.path]
        own = self._scaled[place]
        if place == len(self.ranks) - 1:  # of no more use; those of all layers would pile up
            self._scaled, self._input = (), None
        return own


def scaled(x: Tensor, inner: Tensor, c: Tensor, ranks: list[int]) -> tuple[Tensor, ...]:
    """Returns (x V) ∘ c_k for every k, of sites that share V's product: (rows, copies * rank) each.

    Args:
        x: (…, n), branch-major.
        inner: [V₁ V₂ …]ᵀ, (width, n).
        c: (branches, copies, width).
        ranks: columns of each site.
    """
    h = F.linear(x, inner)  # (…, width)
    branches, copies, width = c.shape
    by_branch = h.view(branches, -1, width)
    if copies > 1:
        parts = zip(by_branch.split(ranks, -1), c.split(ranks, -1), strict=True)
        products = ((part[:, :, None] * of[:, None]).to(h.dtype) for part, of in parts)
        return tuple(part.view(-1, copies * part.shape[-1]) for part in products)
    if h.dtype == c.dtype:
        by_branch.mul_(c)
    else:
        h = (by_branch * c).to(h.dtype)
    return h.view(-1, width).split(ranks, dim=1)


def summed(x: Tensor, inner: Tensor, c: Tensor) -> Tensor:
    """Returns Σ_k (x L_k) ∘ c_k of a conv1d site: (rows, rank); arguments are those of `scaled`."""
    branches, copies, rank = c.shape
    h = F.linear(x, inner).view(branches, -1, copies, rank)
    return (h * c[:, None]).sum(dim=2).to(h.dtype).view(-1, rank)


AddTerm = Callable[[Site, Tensor, Tensor], Tensor]  # (site, input, output) -> output with the term
Product = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]  # (forward, input) -> output


@contextmanager
def attached(sites: list[Site], add: AddTerm, product: Product) -> Iterator[None]:
    """Context manager: inside, a site gives what `product` makes of its forward, passed through `add`."""
    with all_replaced((site.module, _wrapped(site, add, product)) for site in sites):
        yield


def _wrapped(site: Site, add: AddTerm, product: Product) -> Callable[..., Tensor]:
    forward = site.module.forward
    if site.plain:

        def plain(input: Tensor) -> Tensor:  # torch's own name, as some call it by keyword
            return add(site, input, product(forward, input))

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
