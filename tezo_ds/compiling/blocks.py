"""Blocks that run compiled inside the fused probe: `compile: true`.

One `torch.compile` serves all blocks of a probe, so blocks that are alike share graphs; sizes of batches are
symbols in them. Weights are gathered by hooks around a block, which stay outside. Whatever a twin would leave
out (hooks within a block, stand-ins, a cache of keys and values, other rows) sends that call the eager way.
"""

from __future__ import annotations

import logging
import textwrap
import types
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map_only

from tezo_ds.compiling.twins import HOOKS, Call, parts_of, run, twin_of
from tezo_ds.errors import ConfigError
from tezo_ds.models.structure import PLAIN, blocks
from tezo_ds.probes.base import Probe
from tezo_ds.probes.fused import FusedProbe
from tezo_ds.probes.sites import Group, Site
from tezo_ds.sharding.base import Sharding
from tezo_ds.trunk.outputs import hidden_in
from tezo_ds.trunk.stand_ins import Act, replaced

log = logging.getLogger(__name__)

BACKEND = "inductor"
Shows = Callable[[Tensor], bool]


class Blocks:
    """Compiled forms of a model's blocks, made when they are first called.

    Args:
        sharding: the model.
        probe: the probe, in whose forwards they run.
        graphs: whether what is compiled is recorded as CUDA graphs.
    """

    def __init__(self, sharding: Sharding, probe: FusedProbe, graphs: bool = False) -> None:
        compiled, failed, self.eager = _compiled(graphs), set[str | int](), Counter[str]()
        by_module = {id(site.module): site for site in probe.sites}
        strange = {id(site.module) for site in probe.vector_sites}
        self._blocks: list[Block] = []
        found = [] if sharding.uncompiled else blocks(sharding.module)
        for block in found:
            within = {id(m): by_module[id(m)] for m in block.modules() if id(m) in by_module}
            if not within:
                continue
            if reason := _reason(block, within, strange):
                self.eager[reason] += 1
            else:
                self._blocks.append(Block(block, within, probe.shows, compiled, failed))
        for reason, count in self.eager.items():
            _warn(f"{count} of {count + len(self._blocks)} blocks run", reason)
        if not self._blocks and not self.eager:
            why = "no matrix of theirs trains" if found else "none are known of the model"
            _warn("all blocks run", sharding.uncompiled or why)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Context manager: blocks inside run compiled where they can."""
        with ExitStack() as stack:
            for block in self._blocks:
                if block.is_plain():
                    stack.enter_context(replaced(block.module, block.around(block.module.forward)))
            yield


class Block:
    """One block, its twin, and when this may run in its place.

    Args:
        module: the block.
        sites: its sites, by the ids of their modules.
        shows: tells whether hidden states show which rows belong to which branch.
        compiled: `run`, compiled.
        failed: names of classes, and ids of blocks, that did not compile.
    """

    def __init__(
        self, module: nn.Module, sites: dict[int, Site], shows: Shows, compiled: Callable[..., Any],
        failed: set[str | int],
    ) -> None:  # fmt: skip
        self.module, self._sites, self._shows = module, sites, shows
        self._compiled, self._failed = compiled, failed
        self._parts = list(parts_of(module))
        self._twin: nn.Module | None = None
        self._groups: list[Group] = []
        self._call = Call([])

    def is_plain(self) -> bool:
        """Returns whether no module of the block acts otherwise than by its class."""
        return not any("forward" in vars(m) for m in (self.module, *(p[2] for p in self._parts)))

    def around(self, eager: Act) -> Act:
        """Returns a forward that runs the twin, compiled, or the eager forward where the twin may not."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._fits(args, kwargs):
                return eager(*args, **kwargs)
            if self._twin is None:
                self._make()
            # One tensor of its own: the places of views within another would be part of a graph.
            c = torch.cat([group.c for group in self._groups], dim=-1)
            torch._dynamo.mark_static(c, (1, 2))  # no symbols, which a batch's sizes might equal
            try:
                return self._compiled(self._twin, self._call, c, args, kwargs)
            except _failures() as error:  # before anything of the block has run
                self._fail(error)
                return eager(*args, **kwargs)

        return forward

    def _fail(self, error: Exception) -> None:
        full = "RecompileLimit" in type(error).__name__  # the graphs that there are remain
        self._failed.add(id(self) if full else type(self.module).__qualname__)
        which = "one block runs" if full else f"blocks {type(self.module).__name__} run"
        text = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        _warn(which, textwrap.shorten(text, 160, placeholder=" …"))

    def _make(self) -> None:
        """Makes the twin, once it is known which sites share a product."""
        self._groups = list({id(s.group): s.group for s in self._sites.values()}.values())
        self._call = Call([group.width for group in self._groups])
        self._twin = twin_of(self.module, self._sites, self._groups, self._call)

    def _fits(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Returns whether this call is one that the twin knows: nothing watches the block's modules or stands
        in for them, and all that it is given are tensors and plain values."""
        if {type(self.module).__qualname__, id(self)} & self._failed:
            return False
        if self.module.training or is_in_torch_dispatch_mode() or not self._untouched():
            return False
        if not all(isinstance(x, _VALUES) for x in tree_leaves((args, kwargs))):
            return False
        return self._shows(hidden_in(args, dict(kwargs)))

    def _untouched(self) -> bool:
        for parent, name, module in self._parts:
            if parent._modules.get(name) is not module or _is_watched(module):
                return False
            if "forward" in vars(module) and id(module) not in self._sites:
                return False
        return True


_VALUES = (Tensor, bool, int, float, str, type(None))


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _reason(block: nn.Module, sites: Mapping[int, Site], strange: Collection[int]) -> str:
    """Returns why a block cannot have a twin; "" if it can."""
    for _, _, module in parts_of(block):
        kind, site = type(module).__name__, sites.get(id(module))
        if id(module) in strange:
            return f"vectors or adapters train in {kind}"
        if any(vars(module).get(name) for name in HOOKS) or "forward" in vars(module):
            return f"{kind} has hooks or a forward of its own"
        if site is not None and site.split:
            return f"{kind} is split by tensor parallelism"
        if site is not None and site.kind != "conv1d" and type(module).forward not in PLAIN[:1]:
            return f"{kind} is no plain linear layer"
    return ""


def _compiled(graphs: bool) -> Callable[..., Any]:
    """Returns `run` compiled; of a code object of its own, as graphs and their limit go by that."""
    own = types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__)
    mode = "reduce-overhead" if graphs else None
    compiled = torch.compile(own, fullgraph=True, dynamic=True, backend=BACKEND, mode=mode)
    return _copied(compiled) if graphs else compiled


def _copied(recorded: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function whose results are its own: a recorded graph's next replay writes over them."""

    def run(*given: Any) -> Any:
        return tree_map_only(Tensor, torch.clone, recorded(*given))

    return run


def _failures() -> tuple[type[Exception], ...]:
    from torch._dynamo import exc

    limit = getattr(exc, "FailOnRecompileLimitHit", exc.TorchDynamoException)
    return exc.TorchDynamoException, limit


def _warn(which: str, reason: str) -> None:
    log.warning("compile: %s eagerly (%s)", which, reason)


def compile_blocks(probe: Probe, sharding: Sharding, graphs: bool) -> None:
    """Lets a probe's blocks run compiled from now on.

    Raises:
        ConfigError: it is not the fused probe; or `graphs`, which cannot be recorded here.
    """
    if not isinstance(probe, FusedProbe):
        raise ConfigError(
            f"compile: is for the fused probe, and this run needs {probe.name}; leave compile off"
        )
    if graphs and not recordable(sharding):
        raise ConfigError(
            "cuda_graphs: replay addresses, so they need a CUDA GPU with whole weights that stay where they "
            f"are, and this model is on {sharding.device.type}{'' if sharding.runs_alone else ', sharded'}; "
            "leave it off"
        )
    probe.around = Blocks(sharding, probe, graphs).attached


def recordable(sharding: Sharding) -> bool:
    """Returns whether CUDA graphs can be recorded of a model's blocks."""
    return sharding.device.type == "cuda" and sharding.runs_alone
