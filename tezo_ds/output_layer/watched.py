"""What an inner layer is given in whole forwards, and what to add to what it gives."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tezo_ds.output_layer.entry import Entry
from tezo_ds.output_layer.inner import InnerLayer
from tezo_ds.trunk.outputs import hidden_in, hidden_of


class Watched:
    """What an inner layer is given, and the hidden states behind its block; what to add to its output.

    Attributes:
        inner: the inner layer.
        given: (B, T, n), or (B * T, n).
        behind: (B, T, d).
        entry: what enters its block, and whether the forward that runs is looked at.
        tried: whether a position that went on alone was compared with a whole forward's.
        push: to be added, (rows, m); None: nothing.
    """

    def __init__(self, module: nn.Module, inner: InnerLayer, stack: ExitStack) -> None:
        self.given = self.behind = torch.empty(0)
        self.push: Tensor | None = None
        self.tried, self.inner = False, inner
        layer, block = inner.layer, inner.block
        self.entry = Entry(module, block, stack)
        for hook in (
            layer.register_forward_pre_hook(self._before, with_kwargs=True),
            layer.register_forward_hook(self._after),
            block.register_forward_hook(self._behind),
        ):
            stack.callback(hook.remove)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.entry.on:
            self.given = hidden_in(args, kwargs)

    def _after(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return None if self.push is None else output + self.push.to(output.dtype).view_as(output)

    def _behind(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.entry.on:
            self.behind = hidden_of(output)
