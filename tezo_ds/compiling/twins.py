"""A block's code with low-rank terms as plain functions of (x, U, V, c), for a compiler to trace.

A twin of a block has its parameters and buffers, copies of its modules without hooks, and other modules where
matrices train. What changes from step to step, c, is an input; U and V are read where the sites hold them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tezo_ds.errors import ProbeError
from tezo_ds.probes.sites import Group, Site, scaled, summed
from tezo_ds.trunk.outputs import hidden_in

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
# Marks by which dynamo treats modules otherwise.
SHARDED = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


def shows(x: Tensor, hidden: Tensor) -> bool:
    """Returns whether x has a row for each row, or for each position, of a block's hidden states."""
    rows, count = hidden.shape[0], x.shape[0]
    return bool(count == rows or (hidden.dim() > 2 and count == rows * hidden.shape[1]))


class Call:
    """What one call of a twin hands to its sites, and they to each other; empty between calls.

    Attributes:
        widths: columns of c of each group of the block.
        c: of each group.
        hidden: hidden states that entered the block.
        read, products: by group, the tensor last multiplied by V, and the products.
    """

    def __init__(self, widths: list[int]) -> None:
        self.widths = widths
        self.c: tuple[Tensor, ...] = ()
        self.hidden: Tensor | None = None
        self.read: list[Tensor | None] = [None] * len(widths)
        self.products: list[tuple[Tensor, ...]] = [()] * len(widths)


class SiteTwin(nn.Module):
    """A site's module whose result has the term added; made by `twin_of`."""

    site: Site
    call: Call
    place: int  # of the site's group in its block
    member: int  # place among its group
    plain: Any  # the module's own forward, as a function

    def forward(self, input: Tensor) -> Tensor:
        """Returns the layer's result with the site's term."""
        site, call, place = self.site, self.call, self.place
        c, y = call.c[place], self.plain(self, input)
        assert call.hidden is not None
        if c.shape[0] > 1 and not shows(input, call.hidden):
            raise ProbeError(f"{site.path}: rows that show no branch")
        site.calls = 1  # not + 1: a number that counts would be part of the graph
        left = summed(input, site.inner, c) if site.kind == "conv1d" else self._shared(input, c)
        return torch.addmm(y.reshape(-1, y.shape[-1]), left, site.outer).view(y.shape)

    def _shared(self, x: Tensor, c: Tensor) -> Tensor:
        group, call, place = self.site.group, self.call, self.place
        if len(group.ranks) == 1:
            return scaled(x, self.site.inner, c, group.ranks)[0]
        if call.read[place] is not x:
            call.read[place] = x
            call.products[place] = scaled(x, group.inner, c, group.ranks)
        return call.products[place][self.member]


def run(twin: nn.Module, call: Call, c: Tensor, args: Any, kwargs: Any) -> Any:
    """Runs a block's twin at coefficients c of its groups, side by side: (branches, copies, widths)."""
    call.c, call.hidden = c.split(call.widths, -1), hidden_in(args, kwargs)
    output = twin.forward(*args, **kwargs)
    call.c, call.hidden = (), None
    for place in range(len(call.widths)):
        call.read[place], call.products[place] = None, ()
    return output


def twin_of(block: nn.Module, sites: dict[int, Site], groups: list[Group], call: Call) -> nn.Module:
    """Returns a twin of a block.

    Args:
        block: the block.
        sites: its sites, by the ids of their modules.
        groups: the groups of these sites.
        call: what the twin's sites are handed.
    """
    places = {id(group): place for place, group in enumerate(groups)}
    made: dict[int, nn.Module] = {}

    def twin(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            site = sites.get(id(module))
            new = made[id(module)] = object.__new__(SiteTwin if site else _class_of(module))
            held = vars(new)
            held.update({name: v for name, v in vars(module).items() if name not in SHARDED})
            held.update({name: type(held[name])() for name in HOOKS}, training=False)
            held.pop("forward", None)
            children = module._modules.items()
            held["_modules"] = {
                name: None if child is None else twin(child) for name, child in children
            }
            if site:
                plain, place = _class_of(module).forward, places[id(site.group)]
                held.update(site=site, call=call, place=place, plain=plain)
                held["member"] = site.group.places[site.path]
        return made[id(module)]

    return twin(block)


def _class_of(module: nn.Module) -> type[nn.Module]:
    """Returns a module's own class, beneath the one that `fully_shard` gives it."""
    return next(kind for kind in type(module).__mro__ if not _is_fsdp(kind))


def _is_fsdp(kind: type) -> bool:
    return any(base.__name__ == "FSDPModule" for base in kind.__mro__)


def parts_of(block: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yields (parent, name in it, module) of all modules within a block."""
    for parent in block.modules():
        for name, child in parent._modules.items():
            if child is not None:
                yield parent, name, child
