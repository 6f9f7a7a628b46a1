"""Count of the memory that tensors take."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Context manager: peak bytes of the storages allocated inside.

    Every operator's results are seen, DeepSpeed's gathers included, and each storage counts with the
    bytes it has for as long as it lives. Memory that is no tensor's does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if _counts(x)}
        result = func(*args, **(kwargs or {}))
        made = {x.untyped_storage() for x in tree_leaves(result) if _counts(x)}
        new = {s._cdata: s for s in made if s._cdata not in given and s._cdata not in self._live}
        for key, storage in new.items():
            self._live[key] = weakref.ref(storage, functools.partial(self._forget, key))
        if new:
            alive = (ref() for ref in list(self._live.values()))
            self.peak = max(self.peak, sum(s.nbytes() for s in alive if s is not None))
        return result

    def _forget(self, key: int, _: object) -> None:
        del self._live[key]


def _counts(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type != "meta"
