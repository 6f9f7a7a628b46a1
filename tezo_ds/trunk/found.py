"""Where a model's trunk ends, found by what one forward calls and in which order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tezo_ds.models.structure import blocks, embeddings, is_encoder_decoder, kind_of, users
from tezo_ds.trunk.noted import Noted
from tezo_ds.trunk.outputs import hidden_alone, hidden_of, with_hidden
from tezo_ds.trunk.stand_ins import Places, places


@dataclass(frozen=True)
class Attention:
    """What mixes positions in a block, as one forward showed it.

    Attributes:
        module: a child of the block.
        last: a linear map within it, whose result is the attention's; None: not known.
        width: size of a token's hidden states that the attention gives.
        alike: whether nothing trains before this map, which is given the same in all branches then.
    """

    module: nn.Module
    last: nn.Module | None
    width: int
    alike: bool


@dataclass(frozen=True)
class Found:
    """A model's blocks in the order of their calls, and the first that trains.

    Attributes:
        blocks: all L of them.
        first: ℓ, the number of blocks before the first module that trains; L if that stands after all.
        outputs: what each block gave, without its hidden states.
        attention: the last block's; None: not known. Only a guess, which `Trunk.settle` tries: the first
            child that is told more than hidden states.
        embedding, head: the model's input embedding and output layer, where it names them.
        embedded: NaN, of the width and dtype of an embedding: (width,).
        after: modules with weights that are called after the last block, and the width of what they give.
        places: where these modules are held.
    """

    blocks: tuple[nn.Module, ...]
    first: int
    outputs: tuple[Any, ...]
    attention: Attention | None
    embedding: nn.Module | None
    head: nn.Module | None
    embedded: Tensor
    after: tuple[tuple[nn.Module, int], ...]
    places: Places

    @property
    def width(self) -> int:
        """Size of a token's hidden states after the trunk."""
        return hidden_of(self.outputs[self.first - 1]).shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states after the trunk."""
        return hidden_of(self.outputs[self.first - 1]).dtype


class Watch:
    """Record of a forward's calls: of blocks, of modules whose parameters train, and of a block's children.

    Args:
        root: the model.
        names: names of all parameters that train.
    """

    def __init__(self, root: nn.Module, names: Collection[str]) -> None:
        self._root = root
        self._embedding, self._head = embeddings(root, "input"), embeddings(root, "output")
        held = {id(c) for m in root.modules() if isinstance(m, nn.ModuleList) for c in m}
        self._blocks = [block for block in blocks(root) if id(block) in held]
        self._training = {id(owner): name for name, owner, _ in users(root, set(names))}
        inner = {id(m) for block in self._blocks for m in block.modules()}
        self._outside = [
            m
            for m in root.modules()
            if id(m) not in inner and any(True for _ in m.parameters(False))
        ]
        self._begin()

    def _begin(self, *_: Any) -> None:
        """Starts the record of a forward, of which there may be several."""
        self._calls: list[nn.Module] = []
        self._outputs: dict[int, Any] = {}
        self._split = False  # hidden states are DTensors
        self._complete = 0  # blocks returned before the first module that trains was called
        self._first: str | None = None
        self._first_of: int | None = None  # id of the module
        self._embedded = torch.empty(0)
        self._after: list[tuple[int, nn.Module, int]] = []  # blocks before it, a module, its width
        self._mixing: dict[
            int, Attention
        ] = {}  # of each block the first child that is such, by its id
        self._made: tuple[nn.Module, Noted] | None = None  # by the linear map that was last called

    def without_a_forward(self) -> str:
        """Returns in a phrase why the model has no trunk, as far as that shows without one; "" otherwise."""
        if not self._blocks:
            return f"{type(self._root).__name__} has no blocks that are known"
        if is_encoder_decoder(self._root):
            return f"{type(self._root).__name__}: each block of a decoder reads the whole encoder"
        first = [self._embedding, *self._blocks[0].modules()]
        found = [self._training[id(module)] for module in first if id(module) in self._training]
        return _too_early(found[0]) if found else ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context manager: the last forward inside is recorded."""
        hooks: list[Any] = [self._root.register_forward_pre_hook(self._begin)]
        hooks += [block.register_forward_hook(self._returned) for block in self._blocks]
        hooks += [
            module.register_forward_pre_hook(self._called)
            for module in self._root.modules()
            if id(module) in self._training
        ]
        hooks += [module.register_forward_hook(self._outside_called) for module in self._outside]
        for block in self._blocks:
            hooks += [
                child.register_forward_hook(self._mixes(block), with_kwargs=True)
                for child in block.children()
            ]
            hooks += [
                module.register_forward_hook(self._maps)
                for module in block.modules()
                if kind_of(module) in ("linear", "conv1d")
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _returned(self, block: nn.Module, _: Any, output: Any) -> None:
        self._calls.append(block)
        if hidden_alone(output):
            hidden = hidden_of(output)
            self._split |= hasattr(hidden, "to_local")
            self._outputs[id(block)] = with_hidden(output, hidden.new_empty(0, hidden.shape[-1]))

    def _called(self, module: nn.Module, _: Any) -> None:
        if self._first is None:
            self._first, self._complete = self._training[id(module)], len(self._calls)
            self._first_of = id(module)

    def _outside_called(self, module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            if module is self._embedding:
                self._embedded = output.new_full((output.shape[-1],), math.nan)
            self._after.append((len(self._calls), module, output.shape[-1]))

    def _maps(self, module: nn.Module, _: Any, output: Any) -> None:
        self._made = (module, Noted(output)) if isinstance(output, Tensor) else None

    def _mixes(self, block: nn.Module) -> Any:
        def note(child: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            """Notes a child that is told more than hidden states: a mask, positions, a cache."""
            hidden = output[0] if isinstance(output, tuple | list) and output else output
            if len(args) + len(kwargs) > 1 and isinstance(hidden, Tensor):
                made = self._made
                last = made[0] if made is not None and made[1].is_(hidden) else None
                alike = last is not None and self._first_of in (None, id(last))
                found = Attention(child, last, hidden.shape[-1], alike)
                self._mixing.setdefault(id(block), found)

        return note

    def result(self) -> Found | str:
        """Returns what was found, or in a phrase why the model has no trunk."""
        kind = type(self._root).__name__
        times = Counter(id(block) for block in self._calls)
        if self._first is None or not times:
            return "no block was called, or no module that trains"
        if not self._complete:
            return _too_early(self._first)
        if max(times.values()) > 1:
            return f"{kind} calls a {type(self._calls[0]).__name__} several times"
        for block in self._calls:
            if id(block) not in self._outputs:
                return (
                    f"{kind}: a {type(block).__name__} hands on more than hidden states (blocks share "
                    "state)"
                )
        if self._split:
            return "hidden states are split by tensor parallelism"
        last = self._calls[-1]
        calls, embedding, head = len(self._calls), self._embedding, self._head
        after = [(m, width) for n, m, width in self._after if n == calls and m is not head]
        named = [module for module in (embedding, head, *dict(after)) if module is not None]
        return Found(
            tuple(self._calls), self._complete, tuple(self._outputs[id(b)] for b in self._calls),
            self._mixing.get(id(last)), embedding, head, self._embedded, tuple(after),
            places(self._root, [*self._calls, *named, *last.modules()]),
        )  # fmt: skip


def _too_early(name: str) -> str:
    return f"{name} trains, and acts before the first block returns"
