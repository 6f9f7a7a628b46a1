"""Forwards that begin at an inner layer's block, as blocks before it know nothing of what is added in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tezo_ds.trunk.found import Found, Watch
from tezo_ds.trunk.outputs import hidden_in
from tezo_ds.trunk.passes import through_rest
from tezo_ds.trunk.stand_ins import replaced


class Entry:
    """What enters a block in whole forwards, and where others may begin.

    Attributes:
        on: whether the forward that runs is looked at.
        given: hidden states that enter the block, (B, T, d).

    Args:
        module: the model.
        block: a transformer block of it.
        stack: takes what is to be undone.
    """

    def __init__(self, module: nn.Module, block: nn.Module, stack: ExitStack) -> None:
        self._module, self.on, self.given = module, False, torch.empty(0)
        own = {id(parameter) for parameter in block.parameters()}
        self._watch: Watch | None = Watch(
            module, [name for name, p in module.named_parameters() if id(p) in own]
        )
        self._found: Found | None = None
        stack.callback(block.register_forward_pre_hook(self._enters, with_kwargs=True).remove)

    def _enters(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.on:
            self.given = hidden_in(args, kwargs)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context manager: a whole forward runs inside, the first of which shows where the block stands."""
        self.on = True
        try:
            if self._watch is None or self._watch.without_a_forward():
                yield
                return
            with self._watch.watching():
                yield
            found = self._watch.result()
            self._found = None if isinstance(found, str) else found
        finally:
            self.on, self._watch = False, None

    @property
    def leaves_out(self) -> bool:
        """Whether forwards inside `beginning` leave out the blocks before this one."""
        return self._found is not None

    def give_up(self) -> None:
        """Runs whole forwards from now on, as later blocks read more than the hidden states that enter."""
        self._found = None

    @contextmanager
    def beginning(self, rows: Tensor, places: Tensor) -> Iterator[None]:
        """Context manager: the model's forward inside, of one token a row, begins at the block.

        Args:
            rows, places: where the rows' hidden states stand in those that entered, int64 (rows,).
        """
        found, forward = self._found, self._module.forward
        if found is None:
            yield
            return
        hidden = self.given[rows, places][:, None]
        with replaced(self._module, lambda **inputs: through_rest(found, forward, inputs, hidden)):
            yield
