"""Sites of a model's adapters, and the terms that they add there without editing the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tezo_ds.adapters.base import Adapter, Weights
from tezo_ds.adapters.places import Place
from tezo_ds.models.structure import kind_of
from tezo_ds.trunk.outputs import called_with, hidden_in, hidden_of, with_hidden

AT_ONCE = 1 << 22  # numbers of a term, at most, as in float32 it may be larger than the activations
NAME = "adapter"  # what follows a module's path in the name of its adapter


class AdapterSite:
    """An adapter at its place in a model.

    Args:
        place: the place.
        adapter: the function that is added there.
    """

    def __init__(self, place: Place, adapter: Adapter) -> None:
        self.path, self.module, self.side = place.path, place.module, place.side
        self.adapter = adapter
        self.name = f"{place.path}.{NAME}"
        self.calls = 0
        self._fresh = kind_of(place.module) is not None  # whose result nobody else holds

    def add(self, x: Tensor, y: Tensor, weights: Weights) -> Tensor:
        """Returns y, or x at a side before, with the term of each branch; rows are branch-major.

        Args:
            x: the module's input.
            y: its output; not looked at before the module.
            weights: result of `Adapter.prepare`, (branches, …) each.
        """
        h, goal = (y if self.side == "after" else x), (x if self.side == "before" else y)
        rows = h.reshape(len(weights[0]), -1, h.shape[-1])  # (branches, rows, size)
        if (
            torch.is_grad_enabled()
        ):  # in a user's own forward: autograd lets no one write into parts
            return (goal + self.adapter.term(weights, rows).view(goal.shape)).to(goal.dtype)
        own = self._fresh and self.side != "before"
        goal = goal.contiguous() if own else goal.clone(memory_format=torch.contiguous_format)
        sums = goal.view(len(rows), -1, goal.shape[-1])
        at_once = max(1, AT_ONCE // (len(rows) * max(rows.shape[-1], sums.shape[-1])))
        for part, some in zip(sums.split(at_once, dim=1), rows.split(at_once, dim=1), strict=True):
            part.add_(self.adapter.term(weights, some))
        return goal

    def chosen(self, weights: Mapping[str, Weights], rows: Tensor) -> dict[str, Any]:
        """Returns the site's weights of some branches alone, int64 (k,), by name."""
        return {self.name: tuple(part[rows] for part in weights[self.name])}

    def add_(self, x: Tensor, y: Tensor, weights: Mapping[str, Weights]) -> Tensor:
        """Returns what `add` does, by the weights of its name."""
        self.calls += 1
        return self.add(x, y, weights[self.name])

    def around(self, add: Callable[[AdapterSite, Tensor, Tensor], Tensor]) -> Callable[..., Any]:
        """Returns a forward of the module whose input, or output, has passed through `add`."""
        forward = self.module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            x = hidden_in(args, kwargs)
            if self.side == "before":
                args, kwargs = called_with(args, kwargs, add(self, x, x))
                return forward(*args, **kwargs)
            output = forward(*args, **kwargs)
            return with_hidden(output, add(self, x, hidden_of(output)))

        return call
