"""Bytes that a step moves inside of nodes and between them."""

from __future__ import annotations

from dataclasses import dataclass

from tezo_ds.plan.job import Job


@dataclass(frozen=True)
class Traffic:
    """Of a step.

    Attributes:
        times: how often the bytes of a forward's gathers go over the wire.
        gathered: those bytes, padding included.
        collectives: that bring them, of all times.
        received: by each rank, of weights and gradients.
        inside: by all ranks of a node from their neighbours in it.
        between: by a node from other nodes.
        scalars: of each message of our own.
    """

    times: int
    gathered: int
    collectives: int
    received: int
    inside: int
    between: int
    scalars: tuple[int, ...]


def engine(job: Job) -> Traffic:
    """Of this engine: one gather a forward."""
    return _ring(job, job.forwards if job.gathers else 0, job.scalars)


def adam(job: Job) -> Traffic:
    """Of first-order training: gathered for the forward and again for the backward, and gradients of 16 bits
    reduced; replicas add theirs up by an all-reduce, two of such."""
    micro = -(-job.examples // job.examples_at_once)
    return _ring(job, 3 * micro if job.gathers else 2, ())


def _ring(job: Job, times: int, scalars: tuple[int, ...]) -> Traffic:
    """Each rank passes on to the next what it has from the one before, and one of a node's ranks has it from
    another node."""
    ranks = job.gather_ranks if job.gathers else job.cluster.world
    whole = job.gathered_bytes or sum(p.nbytes for p in job.module.parameters())
    received = times * whole * (ranks - 1) // ranks
    in_node = job.cluster.in_node
    crosses = ranks > in_node
    return Traffic(
        times=times,
        gathered=whole,
        collectives=times * (job.messages if job.gathers else 1),
        received=received,
        inside=received * (in_node - crosses),
        between=received if crosses else 0,
        scalars=scalars,
    )
