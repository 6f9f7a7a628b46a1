"""Needs of a run, from its model's shapes alone: bytes of memory on a rank, on disk and on the wire.

A lower bound that is meant to be close. Activations of a forward, which grow with the batch, and what
libraries keep for themselves come on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tezo_ds.adapters.found import Adapters
from tezo_ds.config import TezoConfig
from tezo_ds.directions.space import CoefficientSpace, Matrix
from tezo_ds.engine.selection import Selection, select
from tezo_ds.errors import ConfigError
from tezo_ds.methods import Method, make_method
from tezo_ds.models.structure import blocks, embeddings
from tezo_ds.probes import choose_probe
from tezo_ds.probes.inplace import keeps_copies
from tezo_ds.quantised.forms import Form
from tezo_ds.settings import Settings
from tezo_ds.sharding.replicated import Replicated, alone

GIB = 1 << 30
RECORDS = 64 << 20  # journal, metrics and curve of a long run


@dataclass(frozen=True)
class Layout:
    """Spread of a run's weights over ranks.

    Attributes:
        shards: number of ranks that share one copy.
        by_rows: whether shards are whole rows (FSDP2), and not elements (ZeRO-3).
        second: number of ranks that share hpZ's second copy; 0: there is none.
        gathers: whether a forward gathers weights at all.
        offloaded: whether shards lie in the host's memory, or in files.
    """

    shards: int = 1
    by_rows: bool = False
    second: int = 0
    gathers: bool = False
    offloaded: bool = False

    @classmethod
    def of(cls, settings: Settings, deepspeed: Mapping[str, Any] | None, ranks: int) -> Layout:
        """Returns the layout that a run's flags give on `ranks` ranks."""
        if settings.fsdp:
            shards = max(ranks // settings.fsdp_replicas, 1)
            return cls(shards, by_rows=True, gathers=True, offloaded=settings.fsdp_offload_params)
        if deepspeed is None:
            return cls()
        zero = deepspeed["zero_optimization"]
        hpz = zero.get("zero_hpz_partition_size", 1)
        device = (zero.get("offload_param") or {}).get("device")
        second = min(hpz, ranks) if hpz > 1 else 0
        return cls(ranks, second=second, gathers=True, offloaded=device not in (None, "none"))


@dataclass(frozen=True)
class Needs:
    """Bytes that a run needs.

    Attributes:
        shard: a rank's shards of all weights: for each Σ ⌈rows / shards⌉ columns, or ⌈numel / shards⌉,
            and as much for a second copy.
        gathered: weights that are whole at once: those outside of blocks, and two of the largest block;
            under FSDP2, where that is more, twice the former and a block.
        probe: U and V of the fused probe, r(m + n) numbers a matrix (LOZO r((1 + Q)m + n)), and the weights
            of adapters in each branch; for the in-place probe its copy of the trained shards, and for a
            low-rank method U and V beside it.
        state: the method's state, with moments that lie beside the shards.
        disk: the most in the run folder: snapshots, one more while it is written, and the merged model.
        sent: weights that one forward gathers.
    """

    shard: int
    gathered: int
    probe: int
    state: int
    disk: int
    sent: int

    @property
    def device(self) -> int:
        """Bytes on the device that forwards run on, if all lies there."""
        return self.shard + self.gathered + self.probe + self.state


@dataclass(frozen=True)
class PlannedRun:
    """A run that is not made: its model has no weights, and its ranks need not exist.

    Attributes:
        module: model of `loading.load_skeleton`.
        config: the run's config.
        layout: how the weights are to be spread.
        compute: dtype in which weights are gathered; None: their own.
        form: form in which linear layers but the output layer hold their weights; None: plain numbers.
    """

    module: nn.Module
    config: TezoConfig
    layout: Layout = Layout()
    compute: torch.dtype | None = None
    form: Form | None = None

    @cached_property
    def packed(self) -> list[Tensor]:
        """Weights that `form` is of, each once."""
        if self.form is None:
            return []
        plain = [embeddings(self.module, "input"), embeddings(self.module, "output")]
        kept = {id(layer.weight) for layer in plain if layer is not None}
        linears = [m.weight for m in self.module.modules() if isinstance(m, nn.Linear)]
        return [p for p in dict.fromkeys(linears) if id(p) not in kept]

    @property
    def saved(self) -> int:
        """Bytes of a rank's weights that packed ones take less; scales are whole on each rank of FSDP2."""
        if self.form is None:
            return 0
        plain = held_bytes(self.packed, self.layout)
        numbers = [math.ceil(p.numel() * self.form.bits / 8) for p in self.packed]
        scales = sum(self.form.nbytes(p.shape) for p in self.packed) - sum(numbers)
        return plain - sum(math.ceil(n / self.layout.shards) for n in numbers) - scales

    @cached_property
    def _chosen(self) -> Selection:
        """With `rank: auto`, which weights decide, each matrix has the highest rank that it may get."""
        ranks = None
        if self.config.rank == "auto":
            chosen = select(self._alone, self.config.model_copy(update={"rank": 1}))
            ranks = {m.name: min(self.config.rank_max, *m.shape) for m in chosen.matrices}
        return select(self._alone, self.config, ranks=ranks)

    @cached_property
    def _alone(self) -> Replicated:
        return alone(self.module)

    @cached_property
    def space(self) -> CoefficientSpace:
        """Space of the coefficients to learn."""
        return CoefficientSpace(self._chosen.matrices, self.config.seed, self._chosen.vectors)

    @property
    def adapters(self) -> Adapters:
        """Adapters that train beside the weights."""
        return self._chosen.adapters

    @property
    def acting(self) -> set[str]:
        """Names of the parameters that train, and of those in whose modules adapters act."""
        return {*self.space.slices, *self.adapters.at}

    @cached_property
    def method(self) -> Method:
        """The method at its start."""
        return make_method(self.config, self.space, self._alone.device)

    @cached_property
    def fused(self) -> bool:
        """Whether the run has the fused probe."""
        names, factors = self.space.slices.keys(), self.method.factors
        return not choose_probe(self.config, self._alone, names, factors).writes


def needs(run: PlannedRun, snapshots: int = 0, merged: bool = False) -> Needs:
    """Returns the bytes that a run needs.

    Args:
        run: the run; nothing is drawn or sent for it.
        snapshots: number of snapshots that are kept; 0: none is made.
        merged: whether the merged model is written.

    Raises:
        ConfigError, ProbeError: where the run would raise them.
    """
    layout, compute, config = run.layout, run.compute, run.config
    if run.form is not None:
        _refuse_form(run, run.form)
    parameters = dict(run.module.named_parameters())
    shard = held_bytes(parameters.values(), layout)
    trained = {name: parameters[name] for name in run.space.slices if name in parameters}
    numel = sum(_held(p, layout) for p in trained.values())
    dense = config.facts.dense_moments  # float32 beside 16 bits
    equal = sum(part.data.nbytes for part in run.method.state.values())
    whole = sum(p.numel() * _itemsize(p, compute) for p in parameters.values())
    weights = sum(p.numel() * (p.itemsize + 4 * dense) for p in trained.values())
    factors = factor_numel(run.method, config, run.space.matrices)
    disk = RECORDS + (snapshots + 1) * equal + 4 * (factors + run.adapters.numel)
    disk += (snapshots + 1) * weights if writes(config) and snapshots else 0
    disk += sum(p.nbytes for p in parameters.values()) if merged else 0
    return Needs(
        shard=shard - run.saved,
        # A kernel may unpack a matrix as it uses it.
        gathered=_gathered(run) + max((p.nbytes for p in run.packed), default=0),
        probe=_of_probe(run, trained),
        state=equal + 4 * dense * numel,
        disk=disk,
        sent=whole if layout.gathers else 0,
    )


def _refuse_form(run: PlannedRun, form: Form) -> None:
    if run.layout.gathers and (form.name != "4bit" or not run.layout.by_rows):
        raise ConfigError(
            f"weights in {form.name} are not sharded: each rank has a copy; use no sharding, or FSDP2 with "
            "4bit"
        )
    if writes(run.config) or not run.fused:
        raise ConfigError(
            f"weights in {form.name} are only read, and {run.config.method} writes them; use tezo, tezo-m, "
            "tezo-adam-coef or tezo-gn with the fused probe"
        )


def writes(config: TezoConfig) -> bool:
    """Returns whether a run changes weights, and so keeps them in its snapshots."""
    return not config.facts.learns_coefficients or config.writes_periods


def factor_numel(method: Method, config: TezoConfig, matrices: Iterable[Matrix]) -> int:
    """Counts the numbers in U and V of all matrices, as a forward of the fused probe uses them."""
    if method.factors is None:
        return 0
    lefts = 1 + config.queries if config.facts.fresh_left else 1
    periods = 1 + config.keep_periods
    return sum(periods * m.rank * (lefts * m.shape[0] + m.shape[1]) for m in matrices)


def _of_probe(run: PlannedRun, trained: dict[str, Any]) -> int:
    itemsize = max((_itemsize(p, run.compute) for p in trained.values()), default=0)
    held = factor_numel(run.method, run.config, run.space.matrices) * itemsize
    held += run.adapters.bytes_in(run.config.branch_chunk or 2 * run.config.queries)
    if not run.fused and keeps_copies(run.config, run.method.factors):
        held += sum(_held(p, run.layout) * p.itemsize for p in trained.values())
    return held


def held_bytes(parameters: Iterable[Tensor], layout: Layout) -> int:
    """Returns the bytes of parameters on the rank that has most of them."""
    return sum(_held(p, layout) * p.itemsize for p in parameters)


def _held(parameter: Tensor, layout: Layout) -> int:
    """Returns a parameter's elements on the rank that has most."""
    if layout.by_rows:
        rows = parameter.shape[0] if parameter.dim() else 1
        return math.ceil(rows / layout.shards) * (parameter.numel() // max(rows, 1))
    second = math.ceil(parameter.numel() / layout.second) if layout.second else 0
    return math.ceil(parameter.numel() / layout.shards) + second


def gathered_groups(module: nn.Module, compute: torch.dtype | None) -> tuple[int, int]:
    """Returns the bytes of the weights outside of blocks, and of the largest block.

    Args:
        module: the model.
        compute: dtype in which weights are gathered; None: their own.
    """
    sizes = [_bytes(block, compute) for block in blocks(module)]
    return _bytes(module, compute) - sum(sizes), max(sizes, default=0)


def _gathered(run: PlannedRun) -> int:
    layout = run.layout
    if not layout.gathers:
        return 0
    outside, block = gathered_groups(run.module, run.compute)
    if run.form is not None:
        in_block = {id(p) for p in max(blocks(run.module), key=_numel).parameters()}
        largest = sum(p.nbytes for p in run.packed if id(p) in in_block)
        block -= largest - math.ceil(largest * run.form.bits / (8 * run.packed[0].itemsize))
    # FSDP2 lets go of a gathered message when the next one is used, so at first the one of what is outside
    # of blocks lies beside those weights.
    return outside + block + (max(outside, block) if layout.by_rows else block)


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes(module: nn.Module, compute: torch.dtype | None) -> int:
    return sum(p.numel() * _itemsize(p, compute) for p in module.parameters())


def _itemsize(parameter: nn.Parameter, compute: torch.dtype | None) -> int:
    return (compute or parameter.dtype).itemsize
