"""Seconds of a step: the slower of arithmetic and memory, and α + bytes/β of each collective.

A model, not a measurement. Gathers of a forward run ahead of its arithmetic, so that the slower of both
counts, but for the first one, which nothing hides.
"""

from __future__ import annotations

from dataclasses import dataclass

from tezo_ds.directions.space import Matrix
from tezo_ds.plan.job import Job
from tezo_ds.plan.traffic import Traffic

BASE = 8.4e-6  # seconds that NCCL's own model adds to each collective of a ring (tuning.cc)


@dataclass(frozen=True)
class Timing:
    """Seconds of a step.

    Attributes:
        compute: arithmetic of all forwards (and backwards).
        gather: collectives of weights (and gradients).
        exposed: part of `gather` that runs before any arithmetic can.
        update: writing weights and state.
        scalars: our own all-reduces.
        overlapped: whether gathers run beside arithmetic.
    """

    compute: float
    gather: float
    exposed: float
    update: float
    scalars: float
    overlapped: bool

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        both = (
            self.exposed + max(self.compute, self.gather - self.exposed)
            if self.overlapped
            else self.compute + self.gather
        )
        return both + self.update + self.scalars


def engine(job: Job, traffic: Traffic, overlapped: bool) -> Timing:
    """Returns the timing of this engine."""
    late, early = _flops(job)
    compute = job.full_forwards * _seconds(job, late, job.shape.read - job.trunk.read)
    compute += job.trunk_forwards * _seconds(job, early, job.trunk.read)
    update = 0.0
    if not job.run.fused:  # every branch is moved to, the last one left, and the update made
        moves = job.branches + 2
        numel = _trained(job) / job.layout.shards
        # Weights are read and written, and a dense Z of float32 is too.
        update = moves * numel * (2 * job.shape.itemsize + 8) / job.cluster.gpu.hbm
    return _timing(job, traffic, compute, update, overlapped)


def adam(job: Job, traffic: Traffic, overlapped: bool) -> Timing:
    """Returns the timing of first-order training with activation checkpointing: the arithmetic of four
    forwards, the backward having two."""
    micro = -(-job.examples // job.examples_at_once)
    tokens = job.examples_at_once * job.length
    compute = micro * 4 * _forward(job, tokens, fused=False, labels=tokens)
    # Gradients, float32 weights and moments are read, the latter and 16-bit weights written.
    numel = _trained(job) / job.layout.shards
    return _timing(job, traffic, compute, numel * 30 / job.cluster.gpu.hbm, overlapped)


def step_flops(job: Job) -> float:
    """Returns the FLOPs of all forwards of a step of this engine on a rank."""
    late, early = _flops(job)
    return job.full_forwards * late + job.trunk_forwards * early


def _flops(job: Job) -> tuple[float, float]:
    """Returns the FLOPs of a forward of all branches behind the trunk, and of one of the trunk, in which no
    probe acts, on one copy of the examples."""
    attention = 2 * job.length * job.shape.queries * job.trunk.first
    token = 2.0 * (job.trunk.multiplied + attention)
    late = flops(job, job.tokens, job.run.fused) - token * job.tokens
    return late, token * (job.tokens // job.branches_at_once)


def flops(job: Job, tokens: int, fused: bool, labels: int | None = None) -> float:
    """Returns the FLOPs of one forward of a rank: two for each token and weight that it meets, attention in
    full, and the skinny products of a fused probe and of adapters."""
    shape = job.shape
    rows = tokens / job.length * job.labels if labels is None else labels
    total = 2.0 * tokens * (shape.multiplied + 2 * job.length * shape.queries * shape.layers)
    total += 2.0 * rows * shape.vocabulary * shape.hidden
    if fused:
        total += 2.0 * tokens * sum(m.rank * sum(m.shape) for m in _in_blocks(job))
        total += 2.0 * tokens * sum(s.adapter.prepared_numel for s in job.run.adapters.sites)
    return total


def _in_blocks(job: Job) -> list[Matrix]:
    return [m for m in job.run.space.matrices if m.shape[0] != job.shape.vocabulary]


def _forward(job: Job, tokens: int, fused: bool, labels: int | None = None) -> float:
    return _seconds(job, flops(job, tokens, fused, labels), job.shape.read)


def _seconds(job: Job, arithmetic: float, weights: int) -> float:
    """Returns the seconds of some FLOPs, or those in which the weights are read where these are more."""
    gpu = job.cluster.gpu
    took = arithmetic / (gpu.flops * job.cluster.efficiency)
    return max(took, weights * job.bits / 8 / gpu.hbm)


def _trained(job: Job) -> int:
    return sum(m.shape[0] * m.shape[1] for m in job.run.space.matrices)


def _timing(job: Job, traffic: Traffic, compute: float, update: float, overlapped: bool) -> Timing:
    cluster = job.cluster
    ranks = job.gather_ranks if job.gathers else cluster.world
    gather = traffic.received / _rate(job, ranks) + traffic.collectives * _alpha(job, ranks)
    first = job.ahead.messages[0] if job.ahead.messages else job.groups_of_weights[0]
    exposed = gather * first / max(traffic.total, 1) if job.gathers else gather
    return Timing(
        compute, gather, exposed, update,
        sum(all_reduce(job, nbytes) for nbytes in traffic.scalars),
        overlapped,
    )  # fmt: skip


def all_reduce(job: Job, nbytes: int) -> float:
    """Returns the seconds of an all-reduce over all ranks: twice around their ring."""
    world = job.cluster.world
    received = nbytes * (world - 1) / world
    return 2 * (received / _rate(job, world) + _alpha(job, world))


def _rate(job: Job, ranks: int) -> float:
    """Returns bytes a second around a ring of `ranks` ranks."""
    cluster = job.cluster
    crosses = ranks > cluster.in_node
    return min(cluster.gpu.nvlink, cluster.link) if crosses else cluster.gpu.nvlink


def _alpha(job: Job, ranks: int) -> float:
    """Returns the seconds of latency of one collective around a ring of `ranks` ranks."""
    if ranks == 1:
        return 0.0
    cluster = job.cluster
    nodes = max(1, ranks // cluster.in_node)
    between = nodes - 1
    inside = ranks - 1 - between
    return BASE + between * cluster.latency_between + inside * cluster.latency_inside
