"""A planned run on a cluster that need not exist."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torch import nn

from tezo_ds.config import TezoConfig
from tezo_ds.engine.engine import sums_are_shared
from tezo_ds.models.structure import blocks
from tezo_ds.plan.hardware import Cluster
from tezo_ds.plan.needs import Layout, Needs, PlannedRun, gathered_groups, held_bytes, needs
from tezo_ds.plan.prefetch import DEFAULTS, Gathered, Limits, gathered
from tezo_ds.plan.shapes import Outline, outline
from tezo_ds.plan.trunk import Trunk, trunk_of
from tezo_ds.quantised.forms import Form

Sharded = Literal["zero3", "zero3-hpz", "fsdp2", "fsdp2-hybrid", "replicated"]
SHARDINGS: tuple[Sharded, ...] = ("zero3", "zero3-hpz", "fsdp2", "fsdp2-hybrid", "replicated")


@dataclass(frozen=True)
class Job:
    """A planned run with its cluster and the batches of a step.

    Attributes:
        module: model of `shapes.skeleton`.
        config: the run's config.
        sharding: zero3-hpz has a second copy of the weights on each node, fsdp2-hybrid the only one.
        cluster: the cluster that the run would have.
        examples: examples of each rank in a step.
        length: tokens of an example, padding included.
        labels: positions of an example that carry a label.
        limits: ZeRO-3's limits of what is gathered at once.
        cached: whether the step is a later visit to its examples, of which `trunk_cache` has kept what
            enters the first layer that trains.
        form: form in which each rank's copy of the weights is packed; None: plain numbers.
    """

    module: nn.Module
    config: TezoConfig
    sharding: Sharded
    cluster: Cluster
    examples: int
    length: int
    labels: int
    limits: Limits = DEFAULTS
    cached: bool = False
    form: Form | None = None

    @cached_property
    def run(self) -> PlannedRun:
        """The run on one of the cluster's ranks."""
        return PlannedRun(self.module, self.config, self.layout, form=self.form)

    @cached_property
    def bits(self) -> float:
        """Bits of a weight, in the mean over the model."""
        numel = sum(p.numel() for p in self.module.parameters())
        return 8 * (sum(p.nbytes for p in self.module.parameters()) - self.run.saved) / numel

    @cached_property
    def unpacked(self) -> int:
        """Bytes of the largest packed matrix in plain numbers, as a kernel may unpack it."""
        return max((p.nbytes for p in self.run.packed), default=0)

    @cached_property
    def shape(self) -> Outline:
        """Outline of the model."""
        return outline(self.module)

    @cached_property
    def need(self) -> Needs:
        """Bytes that a rank holds for the whole run."""
        return needs(self.run)

    @cached_property
    def groups_of_weights(self) -> tuple[int, int]:
        """Bytes outside of blocks, and of the largest block."""
        return gathered_groups(self.module, None)

    @cached_property
    def in_blocks(self) -> frozenset[nn.Module]:
        """The modules of the model's blocks."""
        return frozenset(m for block in blocks(self.module) for m in block.modules())

    def with_examples(self, examples: int) -> Job:
        """Returns the job with another number of examples a rank; shares what follows from the model."""
        other = replace(self, examples=examples)
        other.__dict__.update(
            run=self.run, shape=self.shape, need=self.need, groups_of_weights=self.groups_of_weights,
            ahead=self.ahead, gathered_bytes=self.gathered_bytes, trunk=self.trunk, saved=self.saved,
            in_blocks=self.in_blocks,
        )  # fmt: skip
        return other

    def as_way(self, *, shared: bool, cached: bool = False) -> Job:
        """Returns the job with its trunk run once for all branches, or in each, or not at all (cached)."""
        config = self.config.model_copy(update={"shared_trunk": shared})
        return replace(self, config=config, cached=cached)

    @cached_property
    def trunk(self) -> Trunk:
        """What comes before the first layer that trains; nothing where every branch runs it."""
        return trunk_of(self.module, self.run.acting if self.config.shared_trunk else ())

    @property
    def gathers(self) -> bool:
        """Whether forwards gather weights."""
        return self.sharding != "replicated"

    @property
    def gather_ranks(self) -> int:
        """Ranks that a forward gathers weights from."""
        if not self.gathers:
            return 1
        by_node = self.sharding in ("zero3-hpz", "fsdp2-hybrid")
        return self.cluster.in_node if by_node else self.cluster.world

    @property
    def layout(self) -> Layout:
        """How the weights are spread."""
        if not self.gathers:
            return Layout()
        by_rows = self.sharding.startswith("fsdp2")
        shards = self.gather_ranks if by_rows else self.cluster.world
        second = self.gather_ranks if self.sharding == "zero3-hpz" else 0
        return Layout(shards, by_rows, second, gathers=True)

    @cached_property
    def ahead(self) -> Gathered:
        """Weights that a forward gathers under ZeRO-3, in DeepSpeed's order; empty for other shardings."""
        if not self.gathers or self.layout.by_rows or self.gather_ranks == 1:
            return Gathered((), ())
        return gathered(self.module, self.cluster.world, self.limits)

    @cached_property
    def gathered_bytes(self) -> int:
        """Bytes that a forward gathers, with the padding of shards to the largest one."""
        if not self.layout.by_rows:
            return sum(self.ahead.messages)
        by_rows = replace(self.run, layout=Layout(self.gather_ranks, by_rows=True))
        return self.gather_ranks * needs(by_rows).shard

    @cached_property
    def saved(self) -> tuple[int, int]:
        """Bytes and number of the messages that a forward does not gather where it leaves the trunk out."""
        trunk = self.trunk
        if not trunk.first or self.gather_ranks == 1:
            return 0, 0
        if (
            self.layout.by_rows
        ):  # what is outside of layers is one message, which later layers need, too
            shards = held_bytes(trunk.weights, Layout(self.gather_ranks, by_rows=True))
            return self.gather_ranks * shards, trunk.first
        late = gathered(self.module, self.cluster.world, self.limits, trunk.modules).messages
        return self.gathered_bytes - sum(late), self.messages - len(late)

    @property
    def trunk_forwards(self) -> int:
        """Number of forwards of a step that run the trunk: one for each part of the examples."""
        return 0 if self.cached else self._parts

    @property
    def _parts(self) -> int:
        """Number of parts that a rank's examples are cut into, by micro_batch."""
        return math.ceil(self.examples / self.examples_at_once)

    @property
    def messages(self) -> int:
        """Number of all-gathers of a forward."""
        return self.shape.layers + 1 if self.layout.by_rows else len(self.ahead.messages)

    @property
    def branches(self) -> int:
        """Number of branches that a rank measures in a step."""
        return self.config.branches

    @property
    def directions(self) -> int:
        """Number of directions of a step, over all ranks."""
        return self.config.directions * self.groups

    @property
    def groups(self) -> int:
        """Number of ranks, or of examples over all ranks, with directions of their own."""
        own = {"per_rank": 1, "per_example": self.examples}.get(self.config.placement)
        return 1 if own is None else own * self.cluster.world

    @property
    def branches_at_once(self) -> int:
        """Number of branches in one forward."""
        if not self.run.fused:
            return 1
        return min(self.config.branch_chunk or self.branches, self.branches)

    @property
    def examples_at_once(self) -> int:
        """Number of examples of one branch in one forward."""
        return min(self.config.micro_batch or self.examples, self.examples)

    @property
    def forwards(self) -> int:
        """Number of forwards of a step."""
        by_branch = math.ceil(self.branches / self.branches_at_once)
        return (by_branch + self.config.facts.solves) * self._parts

    @property
    def full_forwards(self) -> float:
        """Forwards of a step in units of one with all branches: that of tezo-gn's scales has fewer."""
        if not self.config.facts.solves:
            return self.forwards
        scales = 1 + len(self.config.step_scales)
        return self._parts * (1 + scales / self.branches)

    @property
    def tokens(self) -> int:
        """Number of tokens in one forward of a rank."""
        return self.branches_at_once * self.examples_at_once * self.length

    @property
    def scalars(self) -> tuple[int, ...]:
        """Bytes of each all-reduce of a step: examples of each rank, where they have directions of their own;
        with a cache, whether any rank has to run the trunk; loss sum and count of each branch, with the
        request to stop; Σκτ, where ranks add it up; what tezo-gn solves by, and the losses of its scales."""
        losses, run = 16 * self.branches * self.groups + 8, self.run
        of_examples, own = self.config.placement == "per_example", self.config.directions
        own *= self.examples if of_examples else 1
        shared = sums_are_shared(run.method, run.space, self.directions - own)
        asks = self.trunk.first and (self.cached or self.config.trunk_cache != "off")
        sums: tuple[int, ...] = (losses, 8 * run.space.numel) if shared else (losses,)
        if self.config.facts.solves:
            count, scales = self.config.directions, 1 + len(self.config.step_scales)
            sums += (8 * (count**2 + count + 1), 16 * scales)
        counts = (8 * self.cluster.world,) * of_examples
        return counts + (16,) * (self._parts if asks else 0) + sums
