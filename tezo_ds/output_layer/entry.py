"""Forwards that begin at an inner layer's block, as what is added in it changes no block before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tezo_ds.trunk.found import Found, Watch
from tezo_ds.trunk.outputs import hidden_in
from tezo_ds.trunk.passes import through_block, through_rest
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
            self.given = hidden_in(args, kwargs).clone()  # a block may add to it in place

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

    @property
    def place(self) -> int:
        """Number of blocks that are left out."""
        return 0 if self._found is None else self._found.first

    def give_up(self) -> None:
        """Runs whole forwards from now on, as later blocks read more than the hidden states that enter."""
        self._found = None

    @contextmanager
    def beginning(self, hidden: Tensor, alone: bool = False) -> Iterator[None]:
        """Context manager: the model's forward inside begins at the block, with hidden states (B, T, d);
        where the block is to run alone it ends behind it, too, and gives nothing."""
        found, forward = self._found, self._module.forward
        if found is None:
            yield
            return
        through = through_block if alone else through_rest
        with replaced(self._module, lambda **inputs: through(found, forward, inputs, hidden)):
            yield


class Late:
    """Hidden states that enter the first inner layer's block in the whole forward of each batch, and forwards
    of the same batches that begin there. Where no blocks can be left out none are kept, and these run whole.
    """

    def __init__(self) -> None:
        self._entry: Entry | None = None
        self._kept: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept on this rank."""
        return sum(hidden.nbytes for hidden in self._kept)

    def keep(self, entries: Sequence[Entry]) -> None:
        """Keeps what entered in the last whole forward, of the first of some blocks."""
        if all(entry.leaves_out for entry in entries):
            self._entry = min(entries, key=lambda entry: entry.place)
            self._kept.append(self._entry.given)

    def beginning(self, batch: int) -> AbstractContextManager[None]:
        """Context manager: a forward of that batch, by its number, begins at the block."""
        return nullcontext() if self._entry is None else self._entry.beginning(self._kept[batch])
