"""Modules that stand in a model in another's place for the time of a forward.

A module that is not called has no hooks, so neither ZeRO-3 nor FSDP2 gathers its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

Act = Callable[..., Any]


class StandIn(nn.Module):
    """A module that acts as it is told, and has otherwise the attributes of the one it stands for.

    Args:
        module: the module in whose place it stands; not a submodule of this one.
        act: what it does when it is called.
    """

    def __init__(self, module: nn.Module, act: Act) -> None:
        super().__init__()
        self.__dict__["_stands_for"], self.__dict__["_act"] = module, act

    def __getattr__(self, name: str) -> Any:  # such as a block's attention_type, read by the model
        return getattr(self.__dict__["_stands_for"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Acts."""
        return self.__dict__["_act"](*args, **kwargs)


Places = Mapping[int, list[tuple[nn.Module, str]]]  # (parent, name in it) by id of a module


def places(root: nn.Module, modules: list[nn.Module]) -> Places:
    """Returns where the given modules are held in a model, by their ids."""
    found: dict[int, list[tuple[nn.Module, str]]] = {id(module): [] for module in modules}
    for parent in root.modules():
        for name, child in parent._modules.items():
            if child is not None and id(child) in found:
                found[id(child)].append((parent, name))
    return found


@contextmanager
def swapped(where: Places, acts: list[tuple[nn.Module, Act]]) -> Iterator[None]:
    """Context manager: stand-ins act inside in the place of some modules."""
    before: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for module, act in acts:
            stand_in = StandIn(module, act)
            for parent, name in where[id(module)]:
                before.append((parent, name, module))
                parent._modules[name] = stand_in
        yield
    finally:
        for parent, name, module in before:
            parent._modules[name] = module


@contextmanager
def replaced(module: nn.Module, forward: Act) -> Iterator[None]:
    """Context manager: a module has another forward inside, and its hooks still run; may be nested."""
    with all_replaced([(module, forward)]):
        yield


@contextmanager
def all_replaced(forwards: Iterable[tuple[nn.Module, Act]]) -> Iterator[None]:
    """Context manager: each module has another forward inside, as by `replaced`. Of a module that comes
    twice the second forward is asked for once the first is in place."""
    before: list[tuple[nn.Module, Act | None]] = []
    try:
        for module, forward in forwards:
            before.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, old in reversed(before):
            del module.__dict__["forward"]
            if old is not None:
                module.__dict__["forward"] = old
